"""Many pictures: batches by shape, tables of pictures, parts of the work, and going on after a kill."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from arm_hf.folders import ImageFile, OutputFiles, collect_images, plan_outputs
from arm_hf.image_tables import ImageTable, is_table, tables_of
from arm_hf.manifest import Manifest, Part, digest
from arm_hf.modeling.prompts import parse_labels
from arm_hf.segmenting import RunSettings, load_pipeline, run_record, segment_files
from arm_hf.streaming import WriteBehind, batched_by, mapped_ahead, threads

RECORD = {"model": "m", "labels": [], "settings": {"method": "sclip"}, "arm_hf": "0"}


class TestStreaming:
    @given(st.lists(st.sampled_from("abcde")), st.integers(1, 4), st.integers(0, 6))
    def test_batches_hold_every_item_once_and_one_kind(self, kinds, size, most_waiting):
        items = list(enumerate(kinds))
        taken = []

        def source():
            for item in items:
                taken.append(item)
                yield item

        given_out: list = []
        for batch in batched_by(lambda item: item[1], source(), size, most_waiting):
            assert 1 <= len(batch) <= size and len({kind for _, kind in batch}) == 1
            given_out += batch
            if len(taken) < len(items):
                assert len(taken) - len(given_out) <= most_waiting
        assert sorted(given_out) == items

    @pytest.mark.parametrize("workers", [0, 3])
    def test_mapping_ahead_keeps_order_and_is_bounded(self, workers):
        taken = []

        def source():
            for item in range(50):
                taken.append(item)
                yield item

        with threads(workers) as pool:
            results = mapped_ahead(lambda x: x * x, source(), pool, 4)
            assert next(results) == 0
            assert len(taken) <= 5
            assert list(results) == [x * x for x in range(1, 50)]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_errors_of_threads_come_out(self, workers):
        with threads(workers) as pool:
            with pytest.raises(ZeroDivisionError):
                list(mapped_ahead(lambda x: 1 // x, [1, 0], pool, 4))
            behind = WriteBehind(pool, 1)
            with pytest.raises(ZeroDivisionError):
                for x in (1, 0, 1):
                    list(behind.put(lambda x: 1 // x, x))
                list(behind.rest())


class TestPart:
    @given(st.integers(0, 40), st.integers(1, 9))
    def test_parts_cover_everything_once(self, total, count):
        parts = [range(total)[Part.parse(f"{number}/{count}").share] for number in range(1, count + 1)]
        assert sorted(job for part in parts for job in part) == list(range(total))

    def test_launchers(self, monkeypatch):
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        assert Part.parse(None) == Part(0, 1)
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "4")
        assert Part.parse(None) == Part(1, 4)
        assert Part.parse("1/1") == Part(0, 1)  # what is asked for wins

    @pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "3", "1/2/3", "a/b", ""])
    def test_nonsense(self, text):
        with pytest.raises(ValueError, match="NUMBER/COUNT"):
            Part.parse(text)


class TestManifest:
    def job(self, out, name="cat"):
        return ImageFile(f"/photos/{name}.jpg", f"{name}.jpg"), OutputFiles.named(out, name)

    def finish(self, manifest, job):
        for path in job[1].paths():
            path.write_text("{}")
        job[1].legend.write_text(json.dumps({"run": manifest.run, "source": job[0].source}))
        names = [path.name for path in job[1].paths()]
        manifest.add({"source": job[0].source, "labels": names[0], "legend": names[1], "overlay": names[2]})

    def again(self, out, record=RECORD, existing="keep"):
        return Manifest(out, record, Part(), existing)

    def test_finished_pictures_are_kept(self, tmp_path):
        jobs = [self.job(tmp_path, name) for name in ("cat", "dog")]
        first = self.again(tmp_path, existing="refuse")
        assert list(first.left(jobs)) == jobs
        self.finish(first, jobs[0])
        second = self.again(tmp_path)
        assert list(second.left(jobs)) == jobs[1:]
        assert second.num_kept == 1
        assert list(self.again(tmp_path, existing="replace").left(jobs)) == jobs
        with pytest.raises(ValueError, match=r"cat\.png' exists already; go on .*--resume"):
            list(self.again(tmp_path, existing="refuse").left(jobs))

    def test_a_line_cut_by_a_kill_does_not_count_and_spoils_nothing(self, tmp_path):
        jobs = [self.job(tmp_path, name) for name in ("cat", "dog")]
        first = self.again(tmp_path)
        self.finish(first, jobs[0])
        first.close()
        path = tmp_path / "manifest.jsonl"
        path.write_bytes(path.read_bytes() + b'{"run": "12", "leg')
        second = self.again(tmp_path)
        self.finish(second, jobs[1])
        second.close()
        assert list(self.again(tmp_path).left(jobs)) == []

    def test_without_the_record_the_legend_decides(self, tmp_path):
        job = self.job(tmp_path)
        manifest = self.again(tmp_path)
        self.finish(manifest, job)
        manifest.close()
        (tmp_path / "manifest.jsonl").unlink()
        assert list(self.again(tmp_path).left([job])) == []

    def test_lost_files_are_made_again(self, tmp_path):
        job = self.job(tmp_path)
        self.finish(self.again(tmp_path), job)
        job[1].overlay.unlink()
        assert list(self.again(tmp_path).left([job])) == [job]

    def test_other_settings_and_other_pictures_are_refused(self, tmp_path):
        job = self.job(tmp_path)
        self.finish(self.again(tmp_path), job)
        other = {**RECORD, "settings": {"method": "naclip"}}
        with pytest.raises(ValueError, match="made with method = 'sclip', this run has 'naclip'"):
            list(self.again(tmp_path, other).left([job]))
        with pytest.raises(ValueError, match=r"belongs to '/photos/cat.jpg', not to '/other/cat.jpg'"):
            list(self.again(tmp_path).left([(ImageFile("/other/cat.jpg", "cat.jpg"), job[1])]))
        job[1].legend.write_text("my own notes")
        (tmp_path / "manifest.jsonl").unlink()
        with pytest.raises(ValueError, match="exists already"):
            list(self.again(tmp_path).left([job]))

    def test_left_over_temporary_files_of_own_pictures_go(self, tmp_path):
        for name in (".cat.png.77.part", ".dog.png.77.part"):
            (tmp_path / name).write_text("half")
        list(self.again(tmp_path).left([self.job(tmp_path)]))
        assert [path.name for path in tmp_path.iterdir()] == [".dog.png.77.part"]

    def test_a_new_version_of_the_package_may_go_on(self):
        assert digest(RECORD) == digest({**RECORD, "arm_hf": "9"})
        assert digest(RECORD) != digest({**RECORD, "model": "n"})


def encoded(shade: int, size=(40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 40, 90)).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def parquet(tmp_path):
    """Three files with 5, 0 and 3 pictures, written without the `datasets` library; row 1 of the first is broken."""
    folder = tmp_path / "table"
    folder.mkdir()
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for number, rows in enumerate((5, 0, 3)):
        pictures = [{"bytes": encoded(20 * row), "path": f"{number}{row}.png"} for row in range(rows)]
        if number == 0:
            pictures[1]["bytes"] = b"broken"
        columns = {"image": pa.array(pictures, kind), "id": pa.array(range(rows), pa.int64())}
        pq.write_table(pa.table(columns), folder / f"{number}.parquet")
    return folder


class TestTable:
    def test_what_counts_as_one(self, tmp_path, monkeypatch, parquet):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "photos").mkdir()
        assert is_table("x.parquet") and is_table("owner/name") and is_table("hf://datasets/a/b") and is_table("table")
        for given_ in ("photos/name", "photos", "a/b/c", "cat.jpg", "owner/cat.jpg", "https://a.b/c", "name"):
            assert not is_table(given_), given_
        assert tables_of(["a.jpg", "photos"]) == []
        assert tables_of(["a.parquet", "b.parquet"]) == ["a.parquet", "b.parquet"]
        for inputs in (["a.parquet", "a.jpg"], ["owner/name", "a.parquet"], ["owner/name", "owner/other"]):
            with pytest.raises(ValueError, match="cannot be mixed"):
                tables_of(inputs)

    @pytest.mark.parametrize("count", [1, 2, 3, 5])
    def test_parts_cover_every_row_once(self, parquet, tmp_path, count):
        table = ImageTable([str(parquet)])
        names, total = [], 0
        for index in range(count):
            part = Part(index, count)
            jobs = list(table.jobs(Manifest(tmp_path / "out", RECORD, part)))
            assert table.total(part) == len(jobs)
            total += len(jobs)
            names += [outputs.labels.relative_to(tmp_path / "out").as_posix() for _, outputs in jobs]
        assert sorted(names) == [
            *(f"00000/00000/{row:03d}.png" for row in range(5)),
            *(f"00001/00000/{row:03d}.png" for row in range(3)),
        ]

    def test_patterns_columns_and_errors(self, parquet, tmp_path):
        assert ImageTable([str(parquet / "[02].parquet")]).total(Part()) == 8
        plain = tmp_path / "plain.parquet"
        pq.write_table(pa.table({"photo": [encoded(1)], "thumb": [encoded(2)]}), plain)
        job, _ = next(ImageTable([str(plain)], column="photo").jobs(Manifest(tmp_path, RECORD, Part())))
        assert job.data == encoded(1) and job.source.endswith("plain.parquet[0]")
        with pytest.raises(ValueError, match=r"2 columns with pictures \(photo, thumb\).*--image-column"):
            ImageTable([str(plain)])
        with pytest.raises(ValueError, match="no column 'image'; its columns are photo, thumb"):
            ImageTable([str(plain)], column="image")
        with pytest.raises(ValueError, match="there is no file or folder"):
            ImageTable([str(tmp_path / "no*.parquet")])
        with pytest.raises(ValueError, match="holds no rows"):
            ImageTable([str(parquet / "1.parquet")])
        plain.write_bytes(b"nothing")
        with pytest.raises(ValueError, match=r"cannot read the parquet file '.*plain.parquet'"):
            ImageTable([str(plain)])
        with pytest.raises(ValueError, match="cannot open the data set 'nobody/nothing'"):
            ImageTable(["nobody/nothing"])

    def test_a_data_set_of_the_hub(self, monkeypatch, parquet, tmp_path):
        """The Hub stands for itself here: its loader is given the local files."""
        import datasets

        load, asked = datasets.load_dataset, []

        def from_disk(name, split, revision, streaming):
            asked.append((name, split, revision, streaming))
            files = [str(parquet / f"{number}.parquet") for number in (0, 2)]
            return load("parquet", data_files=files, split="train", streaming=streaming)

        monkeypatch.setattr(datasets, "load_dataset", from_disk)
        table = ImageTable(["hf://datasets/owner/name"], split="val", revision="v1")
        jobs = list(table.jobs(Manifest(tmp_path / "out", RECORD, Part())))
        assert asked == [("owner/name", "val", "v1", True)]
        assert len(jobs) == 8 and jobs[0][0].source == "hf://datasets/owner/name@v1#val[0][0]"
        assert table.total(Part()) is None


@pytest.fixture
def pipe(tiny_clip_folder):
    return load_pipeline(str(tiny_clip_folder), device="cpu")


def test_batches_threads_and_tables_change_nothing(tmp_path, photo, pipe, parquet):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, size in enumerate([(64, 48), (48, 64), (64, 48), (64, 64), (48, 64), (64, 48), (64, 48)]):
        photo.resize(size).save(folder / f"{index}.png")
    files = collect_images([folder])

    def run(jobs, **options):
        workers = options.pop("workers", 0)
        settings = RunSettings(parse_labels("cat, dog, sky"), templates="single", **options)
        results = list(segment_files(pipe, jobs, settings, run_record(pipe, settings, "tiny"), workers))
        return {result.file.name: result for result in results}

    one = run(zip(files, plan_outputs(files, tmp_path / "a"), strict=True))
    many = run(zip(files, plan_outputs(files, tmp_path / "b", overlay=False), strict=True), batch_size=3, workers=2)
    assert one.keys() == many.keys() and len(one) == 7
    for name, result in one.items():
        expected = np.asarray(Image.open(result.outputs.labels))
        assert (np.asarray(Image.open(many[name].outputs.labels)) == expected).mean() > 0.999
        assert many[name].outputs.overlay is None and many[name].num_bytes < result.num_bytes
    assert not list((tmp_path / "b").glob("*overlay*"))

    rows = run(ImageTable([str(parquet)]).jobs(Manifest(tmp_path / "c", RECORD, Part())), batch_size=2, workers=1)
    assert len(rows) == 8
    assert rows["01.png"].reason.startswith("cannot read image") and "0.parquet[1]" in rows["01.png"].reason
    assert len(list((tmp_path / "c").rglob("*.json"))) == 7


@pytest.fixture
def many(tmp_path, photo):
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(60):
        photo.resize((64 + index % 3, 48)).save(folder / f"{index:03}.jpg")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def environment(root):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**clean, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(many, out, model, *options):
    arguments = [str(many), "--labels", "cat,dog", "--templates", "single", "--model", str(model), "--out", str(out)]
    return ["-m", "arm_hf.cli", "segment", *arguments, "--device", "cpu", *options]


def recorded(out: Path) -> list[dict]:
    records = [json.loads(line) for path in out.glob("manifest*.jsonl") for line in path.read_text().splitlines()]
    return [record for record in records if "legend" in record]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals differ there")
def test_kill_9_and_resume_lose_nothing(root, many, tmp_path, tiny_clip_folder):
    out = tmp_path / "out"
    arguments = command(many, out, tiny_clip_folder, "--batch-size", "2", "--workers", "1")
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment(root),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 200
        while len(list(out.glob("*.json"))) < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    finished = {out / record["legend"] for record in recorded(out)}
    assert 5 <= len(before) < 60 and finished <= set(before)

    refused = subprocess.run([sys.executable, *arguments], env=environment(root), capture_output=True, text=True)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    again = subprocess.run(
        [sys.executable, *arguments, "--resume"], env=environment(root), capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 1, again.stderr  # the broken one
    assert f"{len(before)} were done before" in again.stdout and " of 61 pictures segmented" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(out.glob("*.json"))) == 60
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    for legend in out.glob("*.json"):
        for name in json.loads(legend.read_text())["files"].values():
            Image.open(out / name).load()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_share_the_work(root, many, tmp_path, tiny_clip_folder, launcher):
    out = tmp_path / "out"
    launch = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2"],
        "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    }[launcher]
    arguments = command(many, out, tiny_clip_folder, "--no-overlay")
    launch += ["--master_port", "0"] if launcher == "torchrun" else ["--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *launch, *arguments],
        env={**environment(root), "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert "part 1-of-2" in done.stdout and "part 2-of-2" in done.stdout, done.stderr
    parts = {path.name: len(path.read_text().splitlines()) for path in out.glob("manifest*.jsonl")}
    assert parts.keys() == {"manifest.1-of-2.jsonl", "manifest.2-of-2.jsonl"}
    images = [record["image"] for record in recorded(out)]
    assert sorted(images) == [f"{index:03}.jpg" for index in range(60)]  # none twice, none missing
    assert len(list(out.glob("*.json"))) == 60

    # One process more than before finds nothing to do.
    again = subprocess.run(
        [sys.executable, *arguments, "--resume", "--part", "3/3"],
        env=environment(root),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "0 of 20 pictures segmented, 20 were done before" in again.stdout, again.stderr
