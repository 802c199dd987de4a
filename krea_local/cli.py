"""The command `krea-local`: txt2img, img2img, serve, download, verify, tiny, info.

Flags, bounds and help come from the fields of `schema`. Built on argparse: a library that reads
pydantic models needed 0.44 s for `--help`, this needs half of that. It and `serving` alone print.
Nothing heavy is imported before the arguments are known to be good.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, get_args

from krea_local import serving
from krea_local._version import __version__
from krea_local.errors import (
    Cancelled,
    DeviceError,
    InvalidRequest,
    KreaError,
    KreaWarning,
    OutputFailed,
    WeightsError,
    WeightsNotFound,
)
from krea_local.flags import (
    FAILED,
    FILTERED,
    GPU,
    INTERRUPTED,
    LOADING,
    OK,
    SOME_FAILED,
    USAGE,
    WEIGHTS,
    add_loading,
    one_line,
)
from krea_local.paths import expanded
from krea_local.schema import (
    PRESETS,
    Acceleration,
    ImageSize,
    Img2ImgRequest,
    OutputFormat,
    Txt2ImgRequest,
    describe_limits,
)

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from krea_local.cluster import Ulysses
    from krea_local.pipeline import Krea
    from krea_local.result import Result
    from krea_local.verifying import FileCheck

Request = Txt2ImgRequest | Img2ImgRequest
EXIT_CODES = """exit codes:
  0 ok    1 failed    2 usage    3 weights or licence    4 GPU
  5 every image was filtered    6 some of several prompts failed    130 interrupted
  143 terminated"""
MAX_PROMPTS_CHARACTERS = 10_000_000
STAND_IN = (
    "no weights of FLUX.1 Krea [dev] here yet: this is drawn with the built-in miniature, which "
    "knows simple shapes on coloured grounds; `krea-local download` fetches the real model"
)
DEBUG_VARIABLE = "KREA_LOCAL_DEBUG"
EXTENSIONS = {".jpeg": "jpeg", ".jpg": "jpeg", ".png": "png"}
# Fields of the API's JSON that say nothing to a command line: the prompt is positional, and
# sync_mode is about URLs in a response.
NOT_FLAGS = ("prompt", "sync_mode", "loras")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        arguments: without the program's name; by default those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # "…" and file names on a terminal of ASCII
            stream.reconfigure(errors="replace")
    try:
        with _ending_tidily():
            code = _run(arguments)
        sys.stdout.flush()
    except OSError as error:  # what was to be printed cannot be: `krea-local … | head`, a full disk
        with contextlib.suppress(OSError, ValueError):
            # Let nothing try again when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"krea-local: {one_line(error)}", file=sys.stderr)
        return FAILED
    return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        parsed = _parser().parse_args(arguments)
    except SystemExit as exit_:  # argparse has printed help or the usage error
        return int(exit_.code or 0)
    run: Callable[[argparse.Namespace], int] = parsed.run
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", KreaWarning)
            warnings.showwarning = _show_warning
            return run(parsed)
    except (KeyboardInterrupt, Cancelled):
        print("krea-local: interrupted", file=sys.stderr)
        return INTERRUPTED
    except KreaError as error:
        return _report(error, as_json=getattr(parsed, "json", False))
    except OSError:
        raise
    except Exception as error:  # a bug, ours or a library's: still one line, and the way to more
        if os.environ.get(DEBUG_VARIABLE):
            raise
        kind = type(error).__name__
        hint = f"{DEBUG_VARIABLE}=1 shows where"
        print(f"krea-local: unexpected {kind}: {one_line(error)}; {hint}", file=sys.stderr)
        return FAILED


@contextlib.contextmanager
def _ending_tidily() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does: temporary files go, nothing is half-written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(error: KreaError) -> int:
    """The exit code that an error ends the command with."""
    for kind, code in ((InvalidRequest, USAGE), (WeightsError, WEIGHTS), (DeviceError, GPU)):
        if isinstance(error, kind):
            return code
    return FAILED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="krea-local",
        description="FLUX.1 Krea [dev] on your own GPU.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"krea_local {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, request, text in (
        ("txt2img", Txt2ImgRequest, "Draw pictures of a prompt."),
        ("img2img", Img2ImgRequest, "Redraw a picture after a prompt."),
    ):
        command = _command(commands, name, text, _generate)
        command.set_defaults(request=request)
        _add_request(command, request)
        _add_sources(command)
        add_loading(command)
    serve = "Serve the hosted API, OpenAI's images API and a page, from here."
    serving.add_flags(_command(commands, "serve", serve, serving.run))
    _add_download(commands)
    _add_verify(commands)
    _add_convert(commands)
    tiny = _command(commands, "tiny", "Write the tiny random-weight checkpoint to a folder.", _tiny)
    tiny.add_argument("folder", metavar="DIR", type=Path, help="an empty or new folder")
    info = _command(commands, "info", "Show versions, GPUs, and what would fit on them.", _info)
    info.add_argument("--json", action="store_true", help="one line of JSON on standard output")
    return parser


def _command(
    commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is not there, so defaults stay one
        allow_abbrev=False,
    )
    command.set_defaults(run=run)
    return command


def _add_request(command: argparse.ArgumentParser, request: type[Request]) -> None:
    command.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help=request.model_fields["prompt"].description
    )
    group = command.add_argument_group("picture")
    for name, field in request.model_fields.items():
        if name in NOT_FLAGS:
            continue
        flag = "--" + name.replace("_", "-")
        if field.annotation is bool:
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, dest=name, help=_help(name, field)
            )
        else:
            group.add_argument(flag, dest=name, metavar=_metavar(name), help=_help(name, field))
    group.add_argument(
        "--lora",
        action="append",
        dest="loras",
        metavar="PATH[:SCALE]",
        type=_lora,
        help="add a LoRA: a .safetensors file, a hub id or a URL, and how strongly it counts, 0 … "
        "4 (default: 1); may be given several times",
    )


def _add_sources(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("input and output")
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt a line, each drawn with all other flags; - is standard input",
    )
    group.add_argument(
        "--from",
        dest="recipe",
        metavar="PICTURE",
        help="repeat a picture that krea_local made; flags given besides win",
    )
    group.add_argument(
        "--output",
        metavar="PATH",
        help="a .jpeg or .png file, overwritten if it is there, or a folder for new files "
        "(default: new files here, named after the prompt)",
    )
    group.add_argument(
        "--json", action="store_true", help="one line of JSON a prompt on standard output"
    )
    group.add_argument(
        "--quiet", action="store_true", help="no progress bar, no notices but the miniature's"
    )


def _add_download(commands: Any) -> None:
    command = _command(
        commands, "download", "Fetch a model's files; run again, it goes on.", _download
    )
    command.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help='"krea" (the default), "dev", "srpo" or a hub id; that of the safety checker, '
        "Falconsai/nsfw_image_detection, fetches nothing else",
    )
    command.add_argument(
        "--variant",
        help='"bf16", the model itself; or Krea\'s transformer in fewer bits: "fp8" (11.9 GB), '
        '"gguf-q8" (12.1), "gguf-q6", "gguf-q5", "gguf-q4" (default: bf16)',
    )
    command.add_argument(
        "--folder",
        metavar="DIR",
        help="where to (default: the hub's cache, where --model MODEL finds it)",
    )
    command.add_argument(
        "--safety-checker",
        action=argparse.BooleanOptionalAction,
        help="also fetch the NSFW checker, 0.34 GB (default: yes)",
    )
    command.add_argument("--quiet", action="store_true", help="no progress bar, no notices")


def _add_verify(commands: Any) -> None:
    command = _command(
        commands, "verify", "Read a model's files and say which are damaged; no network.", _verify
    )
    command.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder, or what the hub's cache holds: an alias or a hub id; mini; tiny (default: "
        "$KREA_LOCAL_MODEL, else FLUX.1 Krea [dev])",
    )
    command.add_argument(
        "--quiet", action="store_true", help="no progress bar, and only what is bad"
    )


def _add_convert(commands: Any) -> None:
    text = "Write a model's transformer in 8 bits: a file that needs less memory."
    command = _command(commands, "convert", text, _convert)
    command.add_argument(
        "file",
        metavar="FILE",
        help="to write: a .safetensors of 8-bit floats, as --acceleration regular multiplies them, "
        "15 GB for the 12 B model; or a .gguf in Q8_0, nearer to the model's own numbers, 13 GB",
    )
    command.add_argument(
        "--model",
        help="as for txt2img; what is not here is not fetched (default: $KREA_LOCAL_MODEL, else "
        "FLUX.1 Krea [dev])",
    )
    command.add_argument(
        "--transformer", metavar="OTHER", help="take this file's transformer instead of the model's"
    )
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def _metavar(name: str) -> str:
    choices = {"output_format": get_args(OutputFormat), "acceleration": get_args(Acceleration)}
    return "|".join(choices[name]) if name in choices else name.rsplit("_", 1)[-1].upper()


def _help(name: str, field: FieldInfo) -> str:
    size = " On the command line such as 1024x768." if name == "image_size" else ""
    return f"{field.description}{size}{describe_limits(name, field)}".replace("%", "%%")


def _generate(parsed: argparse.Namespace) -> int:
    given = vars(parsed)
    if given.get("quiet"):
        warnings.simplefilter("ignore", KreaWarning)
    arguments: dict[str, Any] = {}
    repeat = None
    if "recipe" in given:
        from krea_local.repeat import read_repeat

        repeat = read_repeat(given["recipe"], parsed.request, given)
        arguments = dict(repeat.arguments)
        for notice in repeat.notices:
            warnings.warn(notice, KreaWarning, stacklevel=1)
    flags = {name: given[name] for name in parsed.request.model_fields if name in given}
    if "image_size" in flags:
        flags["image_size"] = _image_size(flags["image_size"])
    arguments |= flags
    target, named_format = _target(given.get("output"), flags.get("output_format"))
    if named_format:
        arguments["output_format"] = named_format
    if given.get("prompts") == "-" and "RANK" in os.environ:
        raise InvalidRequest("--prompts -: several processes cannot share it; name a file")
    requests = [
        parsed.request.parse({**arguments, **prompt}, text=True)
        for prompt in _prompts(given, arguments)
    ]
    if "loras" in flags:
        from krea_local.lora_files import find_lora

        for one in flags["loras"]:  # what is not there is better known before the model is loaded
            find_lora(one["path"], progress="quiet" not in given)
    group = None
    several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
    if several:  # torchrun has started us
        from krea_local.cluster import join

        group = join(given.get("device", "auto"))
    first = group is None or group.rank == 0
    if not first:  # the others help to draw; what there is to say, the first one says
        given["quiet"] = True
        warnings.simplefilter("ignore", KreaWarning)
    model = given.get("model", repeat and repeat.model)
    more_notices: tuple[str, ...] = ()
    single = {"transformer", "text_encoder_2"} & given.keys()
    if model is None and repeat is None and not single and _has_no_weights():
        model, more_notices = "mini", (STAND_IN,)
        if first:  # even with --quiet: nobody may take it for the real model's work
            print(f"krea-local: note: {STAND_IN}", file=sys.stderr)
    krea = _load(given, model, group)
    if repeat and repeat.made_with != krea.label:
        warnings.warn(
            f"{given['recipe']} was made with {repeat.made_with}, this is {krea.label}",
            KreaWarning,
            stacklevel=1,
        )
    codes = []
    for request in requests:
        try:
            result = krea.run(request)
            if first:
                files = target.write(result, only=len(requests) == 1)
                result = replace(result, notices=more_notices + result.notices)
                codes.append(_print(result, files, krea.label, as_json="json" in given))
            else:
                codes.append(OK)
        except KreaError as error:
            # Of several processes, the others would go on with the prompt that failed here.
            if len(requests) == 1 or isinstance(error, Cancelled) or group is not None:
                raise
            codes.append(_report(error, as_json="json" in given))
    if group is not None:
        group.leave()
    failed = [code for code in codes if code not in (OK, FILTERED)]
    if failed:
        return failed[0] if len(failed) == len(codes) else SOME_FAILED
    return FILTERED if FILTERED in codes and OK not in codes else OK


def _has_no_weights() -> bool:
    """Whether nothing names a model, and the default one is not on this machine."""
    from krea_local import weights

    if os.environ.get(weights.MODEL_VARIABLE):
        return False
    try:
        weights.find(fetch=False)
    except WeightsNotFound:
        return True
    return False


def _load(given: dict[str, Any], model: str | None, group: Ulysses | None) -> Krea:
    from krea_local.api import load

    options = {name: given[name] for name in LOADING if name in given}
    return load(model, progress="quiet" not in given, group=group, **options)


def _print(result: Result, files: list[Path], label: str, *, as_json: bool) -> int:
    if as_json:
        answer = result.with_urls([file.absolute().as_uri() for file in files])
        for image, file in zip(answer["images"], files, strict=True):
            image["file"] = str(file)
        answer |= {"model": label, "notices": list(result.notices)}
        print(json.dumps(answer), flush=True)
    else:
        for file, flagged in zip(files, result.has_nsfw_concepts, strict=True):
            note = "  (filtered by the safety checker: black)" if flagged else ""
            print(f"{file}{note}", flush=True)
    return FILTERED if all(result.has_nsfw_concepts) else OK


@dataclass(frozen=True)
class _Target:
    """Where pictures go: new files in `folder`, or, with `file`, that one file, overwritten."""

    folder: Path
    file: Path | None = None

    def write(self, result: Result, *, only: bool) -> list[Path]:
        """Write the pictures; `only` if they are the command's only ones."""
        if self.file is None:
            return result.save(self.folder)
        if not only or len(result.images) > 1:
            return result.save(self.folder, name=self.file.stem)
        from krea_local.recipe import encode, write_atomically

        write_atomically(encode(result.images[0], result.output_format), self.file, overwrite=True)
        return [self.file]


def _target(output: str | None, output_format: str | None) -> tuple[_Target, str | None]:
    """Where to write, and the format that the file's name asks for.

    The folder is made now: what cannot be written is better known before the picture is drawn.
    """
    path = expanded(output) if output else Path()
    if len(path.name.encode()) > 200:
        raise InvalidRequest(f"--output: the name {path.name[:20]!r}… is too long")
    is_folder = path.is_dir() or not path.suffix or (output or "").endswith(("/", os.sep))
    target = _Target(path) if is_folder else _Target(path.parent, path)
    named = None
    if target.file is not None:
        named = EXTENSIONS.get(path.suffix.lower())
        if named is None:
            raise InvalidRequest(f"--output {output}: should be a .jpeg or .png file, or a folder")
        if output_format not in (None, named):
            raise InvalidRequest(f"--output {output}: ends in {path.suffix}, not .{output_format}")
    try:
        target.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputFailed(f"cannot make the folder {str(target.folder)!r}: {reason}") from error
    if not os.access(target.folder, os.W_OK):
        raise OutputFailed(f"cannot write into {str(target.folder)!r}: permission denied")
    return target, named


def _prompts(given: dict[str, Any], arguments: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The prompt of each request: the one on the command line, or the lines of a file."""
    if "prompts" not in given:
        if "prompt" not in arguments:
            raise InvalidRequest("a PROMPT is required, or --prompts FILE, or --from PICTURE")
        yield {}
        return
    if "prompt" in given:
        raise InvalidRequest("give a PROMPT or --prompts, not both")
    name = given["prompts"]
    if name == "-" and sys.stdin is None:
        raise InvalidRequest("--prompts -: standard input is closed")
    try:
        # utf-8-sig: editors on Windows begin a file with a mark that is no part of the prompt.
        stream: IO[str] = sys.stdin if name == "-" else open(name, encoding="utf-8-sig")  # noqa: SIM115
        with stream:
            text = stream.read(MAX_PROMPTS_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidRequest(f"--prompts {name}: cannot be read: {reason}") from error
    if len(text) > MAX_PROMPTS_CHARACTERS:
        raise InvalidRequest(f"--prompts {name}: is over {MAX_PROMPTS_CHARACTERS:,} characters")
    prompts = [line.strip() for line in text.removeprefix("\ufeff").splitlines() if line.strip()]
    if not prompts:
        raise InvalidRequest(f"--prompts {name}: holds no prompts")
    yield from ({"prompt": prompt} for prompt in prompts)


def _lora(text: str) -> dict[str, str]:
    match = re.fullmatch(r"(.+):(\d*\.?\d+)", text)
    return {"path": match[1], "scale": match[2]} if match else {"path": text}


def _image_size(text: str) -> str | ImageSize | dict[str, str]:
    match = re.fullmatch(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*", text)
    if match:
        return {"width": match[1], "height": match[2]}
    if text not in PRESETS:
        presets = ", ".join(PRESETS)
        raise InvalidRequest(f"image_size={text!r}: should be like 1024x768, or one of {presets}")
    return text


def _download(parsed: argparse.Namespace) -> int:
    from krea_local import fetching
    from krea_local.weights import FULL

    given = vars(parsed)
    model, folder = given.get("model", "krea"), given.get("folder")
    quiet = "quiet" in given
    try:
        planned = fetching.plan(
            model,
            variant=given.get("variant", FULL),
            folder=folder,
            safety_checker=given.get("safety_checker", True),
        )
        if not quiet:
            print(f"krea-local: {one_line(planned.describe())}", file=sys.stderr)
        place = fetching.fetch(planned, progress=not quiet)
    except KeyboardInterrupt:
        print(
            "krea-local: interrupted; run it again, and it goes on where it stopped",
            file=sys.stderr,
        )
        return INTERRUPTED
    if planned.on_hub:  # a folder of an alias's name needs its path
        named = os.path.join(os.curdir, folder) if folder else model  # noqa: PTH118
        named = str(place) if planned.variant else named
        print(f'krea-local txt2img "a red fox in fresh snow" --model {shlex.quote(named)}')
    return OK


def _verify(parsed: argparse.Namespace) -> int:
    from krea_local.fetching import gigabytes
    from krea_local.verifying import verify

    given = vars(parsed)
    quiet = "quiet" in given
    checks = verify(given.get("model"), progress=not quiet)
    for one in checks:
        if one.fault:
            print(f"BAD  {one_line(one.path)}: {one_line(one.fault)}")
        elif not quiet:
            done = [one.checksum] if one.checksum else []
            done += [f"{one.tensors} finite tensors"] if one.tensors else []
            what = ", ".join(done) or "read"
            print(f"ok   {one_line(one.name)}  {gigabytes(one.size)}  {what}")
    bad = [one for one in checks if one.fault]
    unknown = sum(not one.fault and not one.checksum for one in checks)
    if not quiet:
        for note in _not_verified(checks, unknown):
            print(f"krea-local: note: {note}", file=sys.stderr)
    if bad:
        print(f"krea-local: {one_line(_remedy(given.get('model'), bad))}", file=sys.stderr)
        return WEIGHTS
    return OK


def _convert(parsed: argparse.Namespace) -> int:
    from krea_local.converting import convert

    given = vars(parsed)
    model, transformer = given.get("model"), given.get("transformer")
    file = convert(parsed.file, model, transformer=transformer, progress="quiet" not in given)
    named = f" --model {shlex.quote(model)}" if model else ""
    level = "" if file.suffix == ".gguf" else " --acceleration regular"
    options = f"{named} --transformer {shlex.quote(str(file))}{level}"
    print(f'krea-local txt2img "a red fox in fresh snow"{options}')
    return OK


def _remedy(model: str | None, bad: Sequence[FileCheck]) -> str:
    """What to do about damaged files."""
    if model in ("mini", "tiny"):
        return "what is built in is damaged: install krea_local again"
    # In the cache the content lies under another name, and has to go.
    files = [shlex.quote(str(one.path.resolve())) for one in bad if one.size]
    delete = f"delete {' '.join(files)} and " if files else ""
    return f"{delete}run `krea-local download` again, with the same MODEL and --folder"


def _not_verified(checks: Sequence[FileCheck], unknown: int) -> Iterator[str]:
    """What a reader of "ok" could take for verified."""
    if unknown:
        yield (
            f"no checksum is known of {unknown} of {len(checks)} files: they were not fetched by "
            "krea-local or the hub's client, so whether they are the published ones is not known"
        )
    if not any(one.name.startswith("safety_checker/") for one in checks):
        yield "there is no safety checker (krea-local download fetches it)"


def _tiny(parsed: argparse.Namespace) -> int:
    from krea_local.tiny import write_tiny

    write_tiny(expanded(parsed.folder))
    print(parsed.folder)
    return OK


def _info(parsed: argparse.Namespace) -> int:
    from krea_local.info import describe, gather

    facts = gather()
    print(json.dumps(facts) if "json" in vars(parsed) else describe(facts))
    return OK


def _report(error: KreaError, *, as_json: bool) -> int:
    """One line for people on standard error; with --json one for programs on standard output."""
    code = exit_code(error)
    message = one_line(error)
    print(f"krea-local: {message}", file=sys.stderr)
    if as_json:
        fault = {"type": type(error).__name__, "message": message, "exit_code": code}
        print(json.dumps({"error": fault}), flush=True)
    return code


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, KreaWarning):
        print(f"krea-local: note: {one_line(message)}", file=sys.stderr)
