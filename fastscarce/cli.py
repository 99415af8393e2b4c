"""The commands: parse, call, print.

Exit codes: 0 done; 1 something on this machine is broken (doctor); 2 an error with a cure;
128 + n stopped by signal n with the state saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fastscarce.config import (
    BenchDataConfig,
    DistillConfig,
    FinetuneConfig,
    LabelCommandConfig,
    SelftrainConfig,
    ShowAugmentConfig,
)
from fastscarce.errors import ConfigError, FastscarceError, Interrupted
from fastscarce.table_config import (
    CacheBuildConfig,
    CacheCompactConfig,
    CacheDiffConfig,
    CacheExportConfig,
    CacheGcConfig,
    CacheInfoConfig,
    CacheVerifyConfig,
)

__all__ = ["console", "main"]

COMMANDS: dict[str, type] = {
    "selftrain": SelftrainConfig,
    "finetune": FinetuneConfig,
    "label": LabelCommandConfig,
    "distill": DistillConfig,
    "show-augment": ShowAugmentConfig,
    "bench-data": BenchDataConfig,
    "cache build": CacheBuildConfig,
    "cache verify": CacheVerifyConfig,
    "cache info": CacheInfoConfig,
    "cache compact": CacheCompactConfig,
    "cache export": CacheExportConfig,
    "cache gc": CacheGcConfig,
    "cache diff": CacheDiffConfig,
}
_CACHE = "cache"
_SHOW = "show-augment"
_BENCH_DATA = "bench-data"
_DOCTOR = "doctor"


def _keys(config: type, prefix: str = "") -> list[str]:
    """All settings by their dotted names."""
    from typing import get_args, get_type_hints

    names: list[str] = []
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        name = f"{prefix}{field.name}"
        names.append(name)
        for kind in (hints[field.name], *get_args(hints[field.name])):
            if dataclasses.is_dataclass(kind) and isinstance(kind, type):
                names += _keys(kind, f"{name}.")
    return names


def _flags(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config) if field.type in (bool, "bool")}


def _command_of(arguments: Sequence[str]) -> str | None:
    """The command that is typed, by its key in `COMMANDS`."""
    words = list(arguments)
    for place, word in enumerate(words):
        two = f"{word} {words[place + 1]}" if place + 1 < len(words) else word
        if two in COMMANDS or word in COMMANDS:
            return two if two in COMMANDS else word
    return None


def _named(arguments: Sequence[str]) -> list[str]:
    """``cache info PATH`` for ``cache info --path PATH``, and ``cache diff A B``."""
    words = list(arguments)
    command = _command_of(words)
    if command is None or not command.startswith(f"{_CACHE} "):
        return words
    names = [field.name for field in dataclasses.fields(COMMANDS[command])]
    place = words.index(_CACHE) + 2
    for name in ("path", "other"):
        if name in names and place < len(words) and not words[place].startswith("-"):
            words[place : place + 1] = [f"--{name}", words[place]]
            place += 2
    return words


def _normalised(arguments: Sequence[str]) -> list[str]:
    """Accept ``--labels-per-class`` for ``--labels_per_class``, and ``--resume`` for ``=true``."""
    if list(arguments[:2]) == ["bench", "data"]:
        arguments = [_BENCH_DATA, *arguments[2:]]
    arguments = _named(arguments)
    command = _command_of(arguments)
    switches = _flags(COMMANDS[command]) if command else set()
    result: list[str] = []
    for place, word in enumerate(arguments):
        if not word.startswith("--"):
            result.append(word)
            continue
        name, equals, value = word.partition("=")
        name = "--" + name[2:].replace("-", "_")
        follower = arguments[place + 1] if place + 1 < len(arguments) else "--"
        if name[2:] in switches and not equals and follower.startswith("-"):
            equals, value = "=", "true"
        result.append(f"{name}{equals}{value}")
    return result


def _of_config(config: type) -> tuple[str, Any]:
    """A command's summary and its parser."""
    from jsonargparse import ArgumentParser

    summary = (config.__doc__ or "").splitlines()[0]
    command = ArgumentParser(description=summary, exit_on_error=False, allow_abbrev=False)
    command.add_argument("--config", action="config", help="YAML file of settings.")
    command.add_class_arguments(config, nested_key=None)
    return summary, command


def _parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="fastscarce",
        description="The best small model from few labelled and many unlabelled images.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(dest="command")
    # A level after the other, as jsonargparse has it.
    for name, config in COMMANDS.items():
        if " " not in name:
            summary, command = _of_config(config)
            commands.add_subcommand(name, command, help=summary)
    summary = "Make and look at a teacher's table."
    tables = ArgumentParser(description=summary, exit_on_error=False, allow_abbrev=False)
    commands.add_subcommand(_CACHE, tables, help=summary)
    actions = tables.add_subcommands(dest="action")
    for name, config in COMMANDS.items():
        if " " in name:
            summary, command = _of_config(config)
            actions.add_subcommand(name.split()[1], command, help=summary)
    doctor = ArgumentParser(
        description="Print what this machine has, and the cure for what is broken.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands.add_subcommand(_DOCTOR, doctor, help="Print what this machine has.")
    return parser


def _explained(error: Exception, arguments: Sequence[str]) -> ConfigError:
    """The parser's complaint as one sentence; an unknown setting with the nearest known one."""
    text = " ".join(str(error).split())
    command = _command_of(arguments)
    unknown = re.search(r"(?:does not accept option '|unrecognized arguments: -*)([\w.\-]+)", text)
    if unknown and command:
        known = _keys(COMMANDS[command])
        near = difflib.get_close_matches(unknown[1], known, n=1)
        name = command.replace("-", " ") if command == _BENCH_DATA else command
        hint = f"did you mean {near[0]}?" if near else f"see fastscarce {name} --help."
        return ConfigError(f"{name} has no setting {unknown[1]!r}; {hint}")
    wrong = re.search(r"invalid choice: '([^']+)'", text)
    if wrong and command is None:
        known = [*COMMANDS, _CACHE, _DOCTOR]
        if _CACHE in arguments:
            known = [name.split()[1] for name in COMMANDS if name.startswith(_CACHE)]
        near = difflib.get_close_matches(wrong[1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else "see fastscarce --help."
        return ConfigError(f"There is no command {wrong[1]!r}; {hint}")
    return ConfigError(text if text.endswith(".") else f"{text}.")


def _parse(arguments: Sequence[str]) -> tuple[str, Any]:
    parser = _parser()
    words = _normalised(arguments)
    try:
        namespace = parser.parse_args(words)
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise _explained(error, words) from error
    command: str = namespace.command
    if command == _DOCTOR:
        return command, None
    values = parser.instantiate(namespace)[command]
    if command == _CACHE:
        command = f"{_CACHE} {values.action}"
        values = values[values.action]
    fields = dataclasses.fields(COMMANDS[command])
    return command, COMMANDS[command](**{field.name: values[field.name] for field in fields})


def _train(command: str, config: Any) -> int:
    from fastscarce import train

    jobs: dict[str, Callable[..., dict[str, Any]]] = {
        "selftrain": train.selftrain,
        "finetune": train.finetune,
        "label": train.label,
        "distill": train.distill,
    }
    run = train.open_run(config, command)
    try:
        complete = run.complete()
        if complete:
            run.say(f"{run.folder} is complete already.")
            return 0
        with run.catching_signals():
            result = jobs[command](run, config)
        run.say(f"done in {result['seconds']:.0f} s: {run.folder / 'report.html'}")
    finally:
        run.close()
    return 0


def _table(command: str, config: Any) -> int:
    """Run a command about tables; 1 where a table is not sound."""
    import yaml

    from fastscarce import cache, train
    from fastscarce.train.ranges import check_ranges

    check_ranges(config)
    match command:
        case "cache build":
            built = train.build_table(config, print)
            state = f"{built.missing} missing" if built.missing else "complete"
            print(f"{built.folder}: {built.written} rows written, {built.kept} were there, {state}")
        case "cache verify":
            found = train.verify_table(config, print)
            for problem in found.problems:
                print(problem)
            print(f"{found.folder}: {found.rows} sound rows, {found.missing} missing")
            if found.deep is not None:
                deep = found.deep
                print(
                    f"asked again about {deep.rows} rows: KL {deep.kl:.2e} nats, {deep.flips} other"
                    f" first classes; twice: {deep.control_kl:.2e}, {deep.control_flips}"
                )
            return 0 if found.sound else 1
        case "cache info":
            print(yaml.safe_dump(cache.info(config.path), sort_keys=False).rstrip())
        case "cache compact":
            before, after = cache.compact(config.path, rows_per_shard=config.rows_per_shard)
            print(f"{before} shards became {after}")
        case "cache gc":
            print("\n".join(cache.gc(config.path)) or "there was nothing to drop")
        case "cache export":
            print(f"{cache.export_parquet(config.path, config.out)} rows: {config.out}")
        case _:
            other = cache.diff(config.path, config.other)
            print(f"made of the same but for: {', '.join(other.keys) or 'nothing'}")
            kl = "" if other.kl is None else f", KL {other.kl:.2e} nats"
            print(
                f"{other.shared} rows in both, {other.equal} of them equal, {other.flips} with "
                f"another first class{kl}"
            )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Words after the program's name. None: those of the process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command, config = _parse(words)
        if command == _DOCTOR:
            from fastscarce.doctor import main as examine

            return examine()
        if command == _BENCH_DATA:
            from fastscarce.train.throughput import bench_data

            print(bench_data(config))
            return 0
        if command == _SHOW:
            from fastscarce.report import show_augment

            print(show_augment(config, print))
            return 0
        if command.startswith(_CACHE):
            return _table(command, config)
        return _train(command, config)
    except Interrupted as error:
        print(str(error), file=sys.stderr)
        return 128 + error.signal
    except KeyboardInterrupt:  # before the run watches for signals, or after
        print(f"Stopped by SIGINT; {_going_on(words)}.", file=sys.stderr)
        return 130
    except FastscarceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {_disk(error)}, then {_going_on(words)}.", file=sys.stderr)
        return 2
    except RuntimeError as error:  # PyTorch says that a worker died wherever the program is
        from fastscarce.data.workers import explain

        trouble = explain(error)
        if trouble is None:
            raise
        print(f"error: {trouble} Then {_going_on(words)}.", file=sys.stderr)
        return 2


def _going_on(words: Sequence[str]) -> str:
    """What to type after a command that ended early."""
    command = _command_of(words)
    if command is not None and "resume" in _flags(COMMANDS[command]):
        return "the same command with --resume goes on with what was saved"
    return "run the same command again: what was written is whole"


def _disk(error: OSError) -> str:
    place = f" ({error.filename})" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"The disk is full{place}; free space"
    return f"{error.strerror or error}{place}; mend that"


def console() -> NoReturn:
    """Run `main` as a process of its own, whose exit code it gives.

    One of several processes ends without the interpreter's teardown. PyTorch's DDP keeps the
    process group alive, and a thread of gloo that drops the last tensor of a broadcast while the
    interpreter is going away aborts the process.
    """
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
