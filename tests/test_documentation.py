"""What the README and docs/ say of the commands is what the commands do."""

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.metric import METRICS
from ds_tune.tuner.cli import COMMANDS

CHECKOUT = Path(__file__).parents[1]
ALL_PAGES = sorted(
    path.relative_to(CHECKOUT)
    for path in (*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md"), *(CHECKOUT / "benchmarks").rglob("*.md"))
)
LOG = CHECKOUT / "docs" / "log"
PAGES = [page for page in ALL_PAGES if (CHECKOUT / page).parent != LOG]  # the log keeps commands as they once were
TEXT = "\n".join((CHECKOUT / page).read_text() for page in PAGES)

PROGRAM = re.compile(r"(?:[A-Z_]+=\S+ +)*(?:\.?/?\S*bin/tune|ds-tune|tune)(?= )")
SHELLS = {"sh", "bash", "shell", "console"}


def options() -> Iterator[tuple[str, str]]:
    for command, (make_parser, _) in COMMANDS.items():
        for action in make_parser()._actions:
            yield from ((command, option) for option in action.option_strings if option.startswith("--"))


def documented_commands() -> Iterator[tuple[Path, str]]:
    """Every command line of ours in a page's shell blocks, and between backticks in its sentences."""
    for page in PAGES:
        text = (CHECKOUT / page).read_text()
        for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
            if language in SHELLS:
                lines = re.sub(r"\\\n\s*", "", block).splitlines()
                yield from ((page, line.strip().removeprefix("$ ")) for line in lines)
        prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
        yield from ((page, " ".join(code.split())) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose))


def arguments_of(line: str) -> list[str] | None:
    """The words after the program's name; None for another program, a synopsis, or a command that is only named."""
    match = PROGRAM.match(line)
    if match is None or re.search(r"…|\.\.\.|\[", line) or line[match.end() :].strip() in COMMANDS:
        return None
    words: list[str] = []
    for word in shlex.split(line[match.end() :], comments=True):
        if word in ("|", ">", "&&", "2>", ";", "--"):
            break
        words.append(word)
    return words


COMMAND_LINES = sorted({(str(page), line) for page, line in documented_commands() if arguments_of(line)})


def with_values(words: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """The words, with a value for each placeholder such as the N of `--trials N`."""
    placeholders = {option: action.metavar for action in parser._actions for option in action.option_strings}
    before = ["", *words]
    return ["2" if word == placeholders.get(last, "") else word for last, word in zip(before, words, strict=False)]


@pytest.mark.parametrize(("command", "option"), sorted(options()))
def test_every_option_is_documented(command: str, option: str) -> None:
    assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", TEXT), f"{option} of {command} is on no page"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("page", "row"), [("options.md", "--metric"), ("results.md", "metrics")])
def test_every_metric_is_in_the_rows_of_the_option_and_of_the_document(metric: str, page: str, row: str) -> None:
    text = (CHECKOUT / "docs" / page).read_text()
    [line] = re.findall(rf"^\| `{row}(?: NAME)?` \|.*$", text, re.MULTILINE)
    assert f"`{metric}`" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command: str) -> None:
    wanted = r"(?:bin/tune|ds-tune) --" if command == "tune" else rf"(?:bin/tune|ds-tune|tune) {command}\b"
    assert re.search(wanted, TEXT)


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_every_documented_command_is_one(page: str, line: str) -> None:
    words = arguments_of(line)
    assert words
    command = words.pop(0) if words[0] in COMMANDS else "tune"
    parser = COMMANDS[command][0]()
    try:
        parser.parse_args(with_values(words, parser))
    except UsageError as error:
        pytest.fail(f"{page}: {line}: {error}")
    except SystemExit as done:
        assert done.code == 0  # --help


def test_there_are_commands_to_check() -> None:
    assert any(page == "README.md" for page, _ in COMMAND_LINES)


def keys_of_the_document() -> list[str]:
    schema = json.loads((CHECKOUT / "tuner" / "reports" / "study.schema.json").read_text())
    return [*schema["properties"], *schema["$defs"]["trial"]["properties"]]


@pytest.mark.parametrize("key", sorted(set(keys_of_the_document())))
def test_every_key_of_the_json_document_is_in_results_md(key: str) -> None:
    rows = re.findall(r"^\| (`.+?) \|", (CHECKOUT / "docs" / "results.md").read_text(), re.MULTILINE)
    assert any(f"`{key}`" in row for row in rows)


@pytest.mark.parametrize("page", ALL_PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", (CHECKOUT / page).read_text()):
        assert (CHECKOUT / page.parent / target).exists(), target


def log_entries() -> list[tuple[str, str, str]]:
    """Date, title and file of each line of the log's index, in its order."""
    return re.findall(r"^- (\d{4}-\d\d-\d\d) · \[(.+)\]\((\S+\.md)\)$", (LOG / "README.md").read_text(), re.MULTILINE)


def test_log_index_lists_each_entry_once_under_its_title_and_date() -> None:
    in_folder = sorted(path.name for path in LOG.glob("*.md") if path.name != "README.md")
    assert sorted(file for _, _, file in log_entries()) == in_folder
    for date, title, file in log_entries():
        assert file.startswith(f"{date}-")
        assert (LOG / file).read_text().startswith(f"# {title}\n"), file


def test_index_of_decisions_has_each_record_under_its_title() -> None:
    folder = CHECKOUT / "docs" / "decisions"
    index = dict(re.findall(r"^\| \[.+\]\((\S+\.md)\) \| (.+) \|$", (folder / "README.md").read_text(), re.MULTILINE))
    records = {path.name: path.read_text().splitlines()[0].removeprefix("# ") for path in folder.glob("*.md")}
    del records["README.md"]
    assert index == records


def test_log_index_is_newest_first() -> None:
    dates = [date for date, _, _ in log_entries()]
    assert dates == sorted(dates, reverse=True)
