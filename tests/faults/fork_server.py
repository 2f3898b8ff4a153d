"""Runs commands in forked copies of one warm process, so that a test can stop them at any moment of their real work.

A line of JSON on stdin, {"program": "arm-hf" or "train", "arguments": [...], "output": path, "patch": [...]}, starts a
command in a process of its own; its id is printed at once, and its status when it has ended.
"""

import json
import os
import signal
import sys
import traceback
from contextlib import suppress


def run(request: dict) -> int:
    """The command, as a fresh interpreter would run it; returns its exit code."""
    import arm_hf.publishing
    from arm_hf.cli import main as arm_hf_main
    from arm_hf.training.train import main as train_main

    if request.get("unchecked"):  # leave out the two fresh processes
        arm_hf.publishing.check = lambda built: "left out here"
    try:
        if request["program"] == "train":
            return train_main(request["arguments"])
        sys.argv = ["arm-hf", *request["arguments"]]
        arm_hf_main()
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve() -> None:
    """Answer requests until stdin ends."""
    import arm_hf.evaluating
    import arm_hf.evaluation_pictures
    import arm_hf.exporting
    import arm_hf.loading
    import arm_hf.modeling.pipeline_arm
    import arm_hf.publishing
    import arm_hf.segmenting
    import arm_hf.training.train  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            with suppress(BaseException):
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(output, 1)
                os.dup2(output, 2)
                code = run(request)
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
        print(child, file=answers, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    serve()
