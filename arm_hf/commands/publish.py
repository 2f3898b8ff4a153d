"""`arm-hf publish`: put a trained ARM on the Hub, after loading it as a stranger would."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import fail, one_line_errors, quiet_libraries


def publish(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Model folder, folder of a run, or the embedded model.")],
    repo_id: Annotated[str, typer.Option(metavar="ORG/NAME", help="Repository of the Hub; made if it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str, typer.Option(metavar="BRANCH", help="Branch; made if it is missing.")] = "main",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build, check and show all, send nothing.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Add a commit to a branch that holds files.")] = False,
    form: Annotated[
        str | None,
        typer.Option(
            metavar="lean|full|int8", help="ARM alone, with CLIP's towers, or these as int8. Default: as in DIR."
        ),
    ] = None,
    results: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Results of arm-hf evaluate. Default: results.json in DIR.")
    ] = None,
    picture: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Sample picture for the card.")] = None,
    license: Annotated[str, typer.Option(metavar="ID", help="Licence of the weights.")] = "apache-2.0",
    dataset: Annotated[list[str] | None, typer.Option(metavar="ORG/NAME", help="Training data on the Hub.")] = None,
    keep: Annotated[str | None, typer.Option(metavar="FOLDER", help="Keep the built folder here.")] = None,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
) -> None:
    """Publish a trained ARM: build the folder, load it back in fresh processes, show it, upload it in one commit."""
    with one_line_errors():
        import shutil
        import tempfile
        from pathlib import Path

        from arm_hf.folder_cards import CardRequest
        from arm_hf.folders import new_folder, output_folder
        from arm_hf.hub_upload import Destination, files_of, require_token, upload
        from arm_hf.publishing import build, check, describe, find_model

        destination = Destination(repo_id, revision, private, update)
        source = find_model(model)
        if not dry_run:
            require_token()
        if keep is not None and output_folder(keep).exists():
            raise ValueError(f"{keep!r} is there already; choose another folder to --keep")
        quiet_libraries()
        request = CardRequest(results or (), picture or (), license, dataset or ())
        with tempfile.TemporaryDirectory(prefix="arm-hf-") as temporary:
            folder = Path(temporary) / "model"
            built = build(source, folder, repo_id, form, request)
            files_of(folder)
            typer.echo(f"{repo_id}, branch {revision}, {'private' if private else 'public'}, {built.form} weights")
            typer.echo(f"from {source}")
            for line in (*describe(built), *built.notes):
                typer.echo(f"  {line}")
            typer.echo("checking ...")
            typer.echo(f"checked: {check(built)}")
            if keep is not None:
                try:
                    with new_folder(keep) as copy:
                        shutil.copytree(folder, copy, dirs_exist_ok=True)
                except shutil.Error as error:  # one entry for each file: (from, to, reason)
                    raise OSError(f"cannot keep the folder as {keep!r}: {error.args[0][0][2]}") from error
            if dry_run:
                typer.echo("dry run: nothing was sent")
                return
            try:
                url = upload(folder, destination, message or f"Publish {repo_id.rpartition('/')[2]} with arm_hf")
            except KeyboardInterrupt:
                fail("interrupted; nothing was published, the same command goes on where it stopped")
                raise
            typer.echo(f"published: {url}")
