"""``pmixseg segment``: its flags are the modalities of the model, so the model is opened first."""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.box import HORIZONTALS
from rich.table import Table

from pmixseg.cli import preprocess
from pmixseg.cli.arguments import numbers_of, parted
from pmixseg.cli.commands import bar, console, device_of, part_flag
from pmixseg.cli.mistakes import Parser
from pmixseg.cli.weights import MODEL
from pmixseg.data.cohorts.shares import Share
from pmixseg.errors import InputError, count_of
from pmixseg.interrupt import raise_on_interrupt
from pmixseg.task import BRATS, Task, format_combination

if TYPE_CHECKING:
    from pmixseg.data.formats.nifti import Source
    from pmixseg.dicom import Recognised
    from pmixseg.evaluation.prediction.scans import SegmentSettings
    from pmixseg.inference.outputs import CaseResult
    from pmixseg.modules import SegmentationModule

NAME = "segment"
HELP = "segment a patient's own scans, whichever there are"
DESCRIPTION = """Segment scans with a trained model: a case folder, a cohort, a 4-D file with
--channels, or one flag per modality. Any subset of the model's modalities, in any orientation and
spacing; the result lies on the grid of the scans. Research use only: not a medical device."""


def run(args: Sequence[str], modules: Sequence[str] = ()) -> int:
    """Run the command, whose flags depend on the checkpoint's task; return 1 if a case failed."""
    if not args or args[0] in ("-h", "--help"):
        parser_for(BRATS).parse_args(["--help"])
    if args[0].startswith("-"):
        raise InputError("the checkpoint comes first: pmixseg segment CHECKPOINT INPUT -o OUT.")
    from pmixseg.modules import load  # Lightning takes seconds to import
    from pmixseg.modules.checkpoint import read_checkpoint

    task = Task.from_dict(read_checkpoint(args[0])["pmixseg"]["task"])
    options, rest = parser_for(task).parse_known_args(args)
    if rest:
        raise InputError(
            f"'{rest[0]}' is neither an option nor a scan of this model, whose task '{task.name}' "
            f"knows {', '.join(f'--{m}' for m in task.modalities)}; see `pmixseg segment "
            "CHECKPOINT --help`."
        )
    raise_on_interrupt()
    settings = settings_of(options)
    scans = {m: Path(v) for m in task.modalities if (v := getattr(options, f"scan_{m}", None))}
    module = load(options.checkpoint, modules=modules, map_location=device_of(options.device))
    results: list[CaseResult] = []
    with bar("windows") as progress, warnings.catch_warnings():
        # They are in the results, and printed with them.
        warnings.filterwarnings("ignore", message="case '")
        for result in segmented(module, options, scans, settings, progress):
            results.append(result)
    report(results, task)
    return 1 if any(r.problem for r in results) else 0


def parser_for(task: Task) -> argparse.ArgumentParser:
    """Return the command's flags for one task."""
    parser = Parser(
        prog="pmixseg segment",
        description=DESCRIPTION,
        conflict_handler="resolve",  # a modality that is named like an option gets no flag
    )
    parser.add_argument("checkpoint", help=MODEL)
    parser.add_argument("input", nargs="?", type=Path, help="case folder, cohort, or 4-D file")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the results")
    scans = parser.add_argument_group(f"scans (modalities of task '{task.name}')")
    for modality in task.modalities:
        scans.add_argument(
            f"--{modality}", dest=f"scan_{modality}", metavar="FILE", help=task.show(modality)
        )
    scans.add_argument("--channels", help="modalities of a 4-D INPUT in order: flair,t1,-,t2")
    scans.add_argument("--layout", help="name of a layout or YAML file with patterns, for folders")
    scans.add_argument("--name", help="name of the case, which the results carry")
    part_flag(scans)
    how = parser.add_argument_group("how")
    how.add_argument("--tta", action="store_true", help="average over mirrorings; 8 times slower")
    how.add_argument("--overlap", type=float, help="share of a window that the next one covers")
    how.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="number type")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    steps = "some of et_below_500, largest_component, fill_holes, in your order"
    how.add_argument("--postprocess", nargs="*", metavar="STEP", help=steps)
    how.add_argument("--reference", metavar="MODALITY", help="whose grid the result has")
    how.add_argument("--strict", action="store_true", help="refuse scans on different grids")
    how.add_argument(
        "--force",
        action="store_true",
        help="segment scans that look implausible, and ignore those of unknown sequences",
    )
    raw = parser.add_argument_group("scans as they come from the scanner")
    raw.add_argument(
        "--raw",
        action="store_true",
        help="register, bring to atlas space and cut out the brain first; the result lies on the "
        "grid of the --reference scan, or else of T1ce, T1, T2 or FLAIR",
    )
    preprocess.add_flags(raw)
    raw.add_argument(
        "--series",
        action="extend",
        nargs="+",
        default=[],
        metavar="MODALITY=NUMBER",
        help="series of a DICOM folder, where headers do not tell; spaces or commas between",
    )
    what = parser.add_argument_group("what is written")
    what.add_argument(
        "--probabilities", action="store_true", help="write those of every class, 4-D"
    )
    what.add_argument("--entropy", action="store_true", help="write each voxel's entropy, in nats")
    what.add_argument("--png", action="store_true", help="draw planes, contours and volumes")
    what.add_argument(
        "--nnunet",
        action="store_true",
        help="name results CASE.nii.gz, so that nnUNetv2_evaluate_folder takes the folder",
    )
    codes = "numbers of the labels in the results, such as NCR=1 ED=2 ET=4"
    what.add_argument("--codes", nargs="+", metavar="LABEL=NUMBER", help=codes)
    what.add_argument("--no-gzip", action="store_true", help="write .nii instead of .nii.gz")
    return parser


def segmented(
    module: SegmentationModule,
    options: argparse.Namespace,
    scans: Mapping[str, Source],
    settings: SegmentSettings,
    progress: Callable[[int, int], None],
) -> Iterator[CaseResult]:
    """Find out what was given, and segment it."""
    from pmixseg.inference.outputs import Outputs
    from pmixseg.inference.segment import channels_of, segment_files, segment_folder

    source: Path | None = options.input
    what = kind_of_input(options, scans, module.task)
    written = {"compress": not options.no_gzip, "png": options.png, "plain": options.nnunet}
    outputs = Outputs(options.out, options.probabilities, options.entropy, **written)
    share = Share.parse(options.part)
    if share is not None and what != "a folder":
        raise InputError("--part divides a cohort of registered scans; leave it out for a patient.")
    check_flags(options, what)
    raw = None
    if options.raw:
        from pmixseg.inference.raw import RawSettings

        raw = RawSettings(options.brain, options.atlas, onto=options.reference)
        settings = replace(settings, reference=None)
    # Each kind has a function of its own.
    codes = codes_of(options.codes)
    told: dict[str, Any] = {"name": options.name, "progress": progress}
    if source is not None and what == "a DICOM study":
        from pmixseg.inference.dicom import segment_study

        chosen = numbers_of("--series", options.series, "t1ce=5")
        told["tell"] = lambda recognised: console.print(series_table(recognised))
        yield segment_study(module, source, outputs, settings, raw, chosen=chosen, **told)
    elif raw is not None:
        from pmixseg.inference.raw import segment_raw

        given = scans if source is None else raw_scans(source, module.task, force=options.force)
        images = {m: Path(str(path)) for m, path in given.items() if m in module.modalities}
        yield segment_raw(module, images, outputs, settings, raw, codes=codes, **told)
    elif source is not None and what == "a folder":
        told |= {"layout": options.layout, "share": share}
        del told["name"]  # a cohort's cases have names
        yield from segment_folder(module, source, outputs, settings, codes=codes, **told)
    else:
        if source is not None:
            scans = channels_of(source, options.channels, module)
        yield segment_files(module, scans, outputs, settings, codes=codes, **told)


def kind_of_input(
    options: argparse.Namespace, scans: Mapping[str, Source], task: Task
) -> Literal["a DICOM study", "raw scans", "a folder", "a 4-D file", "a scan per flag"]:
    """Say what is segmented: INPUT, or a scan per modality, raw or ready."""
    source: Path | None = options.input
    if (source is None) == (not scans):
        raise InputError(
            "give either a folder or 4-D file, or scans by modality "
            f"({', '.join(f'--{m} FILE' for m in task.modalities)})."
        )
    folder = source is not None and source.is_dir()
    if source is not None and folder and holds_dicom(source, options, task):
        return "a DICOM study"
    if options.raw:
        return "raw scans"
    return "a folder" if folder else "a 4-D file" if source else "a scan per flag"


_TAKEN = {
    "a DICOM study": "name series",
    "raw scans": "name codes",
    "a folder": "layout codes",
    "a 4-D file": "channels name codes",
    "a scan per flag": "name codes",
}
"""What is segmented -> which flags it has, of those that are not for all."""


def check_flags(options: argparse.Namespace, what: str) -> None:
    """Refuse flags that would be passed over, as ``--layout`` beside scans that are named."""
    given = {flag: getattr(options, flag) for flag in " ".join(_TAKEN.values()).split()}
    given |= {"brain": options.brain != "atlas", "atlas": options.atlas}  # of --raw
    taken = f"{_TAKEN[what]} {'brain atlas' if options.raw else ''}".split()
    if odd := [f"--{flag}" for flag, value in given.items() if value and flag not in taken]:
        raise InputError(
            f"{' and '.join(odd)} would be of no use: what is segmented is {what}"
            f"{'' if options.raw else ' without --raw'}; leave {'it' if odd[1:] == [] else 'them'} "
            "out."
        )


def holds_dicom(folder: Path, options: argparse.Namespace, task: Task) -> bool:
    """Return whether a folder holds DICOM files; False where they could not be read either way."""
    try:
        from pmixseg.inference.dicom import is_study
    except InputError:  # the extra is not installed; the folder's layout is looked for
        return False
    return is_study(folder, task, options.out, force=options.force)


def series_table(recognised: Sequence[Recognised]) -> Table:
    """Return a table of series: what each was taken for, and why."""
    columns = ("number", "description", "slices", "taken for", "because")
    table = Table(*columns, title="series", title_justify="left", box=HORIZONTALS)
    for r in recognised:
        taken_for = "not certain" if r.doubtful else r.modality or "not used"
        table.add_row(
            str(r.series.number), r.series.told, str(r.series.slices), taken_for, r.reason
        )
    return table


def raw_scans(source: Path, task: Task, *, force: bool) -> Mapping[str, Path]:
    """Return the files of one patient's raw scans."""
    from pmixseg.inference.folders import scans_in

    images = scans_in(source, task, force=force)[0] if source.is_dir() else {}
    if not images:
        raise InputError(
            f"{source}: --raw takes one patient, a folder of files named by sequence or one "
            "flag per scan; a cohort goes through `pmixseg preprocess` first."
        )
    return images


def settings_of(options: argparse.Namespace) -> SegmentSettings:
    """Return the flags under "how"."""
    from pmixseg.evaluation.prediction.scans import SegmentSettings

    given = {f.name: getattr(options, f.name) for f in fields(SegmentSettings) if f.name in options}
    if options.postprocess:
        given["postprocess"] = parted(options.postprocess)
    return SegmentSettings(**given)


def codes_of(pairs: list[str] | None) -> dict[str, int] | None:
    """Read ``NCR=1 ED=2 ET=4``; ``None`` where the flag was not given."""
    return None if pairs is None else numbers_of("--codes", pairs, "NCR=1,ED=2,ET=4")


def report(results: Sequence[CaseResult], task: Task) -> None:
    """Print volumes, files, warnings and problems."""
    if not results:
        console.print("this part of the cohort has no case")
        return
    done = [r for r in results if r.files]
    if done:
        console.print(volume_table(done, task))
    # Cohorts of several layouts have several codings; each is said once.
    kinds = {tuple(sorted(r.codes.items(), key=lambda item: item[1])): r.name for r in done}
    for codes, name in kinds.items():
        numbers = ", ".join(f"{number} {label}" for label, number in codes)
        whose = "" if len(kinds) == 1 else f" in case {name} and others like it"
        console.print(f"numbers in the files{whose}: 0 background, {numbers}")
    for result in results:
        for sentence in result.warnings:
            console.print(f"warning: {sentence}")
        if result.problem:
            console.print(f"problem: {result.problem}")
    folders: Counter[Path] = Counter()
    for result in done:
        folders[next(iter(result.files.values())).parent] += len(result.files)
    for folder, count in folders.items():
        console.print(f"{count_of(count, 'file')} in {folder}")


def volume_table(results: Sequence[CaseResult], task: Task) -> Table:
    """Return a table of the regions' volumes, a row per case."""
    table = Table(title="volumes in ml, research use only", title_justify="left", box=HORIZONTALS)
    table.add_column("case", no_wrap=True)
    table.add_column("scans")
    for region in task.regions:
        table.add_column(task.show(region), justify="right")
    for result in results:
        volumes = (f"{result.volumes[region]:.2f}" for region in task.regions)
        table.add_row(result.name, format_combination(result.combination), *volumes)
    return table
