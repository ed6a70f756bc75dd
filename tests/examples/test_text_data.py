"""examples/text_data.py: the same bytes, split and samples on every rank, in every run, in every layout."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def text_data() -> ModuleType:
    """The companion module, loaded by its path: examples/ is no package and not on sys.path."""
    spec = importlib.util.spec_from_file_location("example_text_data", EXAMPLES / "text_data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def three_files(tmp_path: Path) -> list[str]:
    """Three text files, each of one letter, so that a byte tells which file it is from."""
    paths = []
    for letter in "abc":
        path = tmp_path / f"{letter}.txt"
        path.write_text(letter * 500)
        paths.append(str(path))
    return paths


def test_standard_library_is_found_and_leaves_tests_and_packages_out(text_data):
    """The default corpus is the standard library's own sources, by portable names."""
    files = text_data.standard_library_files()
    assert "argparse.py" in files
    assert "json/decoder.py" in files
    folders = {folder for name in files for folder in name.split("/")[:-1]}
    assert folders.isdisjoint(text_data.LEFT_OUT_FOLDERS)


def test_standard_library_text_is_large_enough_and_split(text_data):
    """Megabytes to train on, and about five percent of the files to validate on."""
    text = text_data.load_text(None, seq_length=128)
    assert len(text.train) > 2_000_000
    assert 20_000 < len(text.validation) < len(text.train) / 5
    assert text.train.dtype == text.validation.dtype == torch.uint8


def test_text_is_the_same_in_another_process(text_data):
    """Neither hash randomisation nor the order of a directory listing reaches the text."""
    code = (
        "import hashlib, text_data; t = text_data.load_text(None, 128);"
        "print(hashlib.sha256(bytes(t.train) + bytes(t.validation)).hexdigest())"
    )
    digests = set()
    for seed in ("0", "1"):
        environment = os.environ | {"PYTHONPATH": str(EXAMPLES), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        digests.add(subprocess.check_output(command, env=environment, timeout=300))
    assert len(digests) == 1


def test_split_is_disjoint_complete_and_independent_of_the_order(text_data):
    """Every file is on exactly one side, whatever order the names come in."""
    names = [f"module_{number}.py" for number in range(200)]
    train, validation = text_data.split_by_file(names)
    assert set(train) | set(validation) == set(names)
    assert set(train).isdisjoint(validation)
    assert 1 <= len(validation) <= 30
    assert text_data.split_by_file(names[::-1]) == (train, validation)


def test_a_file_keeps_its_side_when_others_come_and_go(text_data):
    """A file's side depends on its own name, so two Python versions mostly agree about the split."""
    names = [f"module_{number}.py" for number in range(200)]
    _, validation = text_data.split_by_file(names)
    _, fewer = text_data.split_by_file(names[:150])
    assert set(fewer) == set(validation) & set(names[:150])


def test_user_files_are_split_by_file(text_data, three_files):
    """With few files one still validates, and none of its bytes is trained on."""
    text = text_data.load_text(three_files, seq_length=64)
    train, validation = set(text.train.tolist()), set(text.validation.tolist())
    assert train | validation == {*b"abc", text_data.END_OF_FILE}
    assert train & validation == {text_data.END_OF_FILE}


def test_one_user_file_validates_with_its_last_tenth(text_data, tmp_path):
    """A single file cannot be split by file; its end validates."""
    path = tmp_path / "one.txt"
    path.write_bytes(b"a" * 899 + b"b" * 100)
    text = text_data.load_text([str(path)], seq_length=64)
    assert bytes(text.train) == b"a" * 899 + b"b"
    assert bytes(text.validation) == b"b" * 99 + b"\0"
    assert "last tenth" in text.description


def test_text_is_cut_at_max_bytes(text_data, three_files):
    """`max_bytes` bounds each side."""
    text = text_data.load_text(three_files, seq_length=64, max_bytes=100)
    assert len(text.train) == len(text.validation) == 100


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "absent.txt", "no such file"),
        (lambda folder: folder, "this is a folder"),
    ],
)
def test_unusable_user_files_are_named(text_data, tmp_path, make, words):
    """A missing file and a folder are errors that name the path and what is wrong with it."""
    path = make(tmp_path)
    with pytest.raises(text_data.TextError, match=words) as error:
        text_data.load_text([str(path)], seq_length=64)
    assert str(path) in str(error.value)


def test_unreadable_file_is_an_error_that_says_why(text_data, tmp_path, monkeypatch):
    """What the operating system said about a file reaches the user."""
    path = tmp_path / "secret.txt"
    path.write_text("a" * 1000)

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(text_data.TextError, match=r"secret\.txt: Permission denied"):
        text_data.load_text([str(path)], seq_length=64)


def test_short_text_is_an_error_that_says_how_much_is_needed(text_data, tmp_path):
    """An empty or short file cannot give one sample."""
    path = tmp_path / "short.txt"
    path.write_text("abc")
    with pytest.raises(text_data.TextError, match="one sample needs 65"):
        text_data.load_text([str(path)], seq_length=64)


def test_no_standard_library_sources_is_an_error_with_the_way_out(text_data, tmp_path, monkeypatch):
    """A Python without sources (an embedded one) is told to give its own text."""
    monkeypatch.setattr(text_data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(text_data.TextError, match="--data"):
        text_data.load_text(None, seq_length=64)


def test_samples_are_windows_and_labels_the_next_bytes(text_data):
    """Labels are the tokens, one further."""
    text = text_data.as_tokens(bytes(range(100)))
    batch = text_data.samples_at(text, [0, 7, 91], seq_length=8)
    assert batch["tokens"].tolist() == [list(range(n, n + 8)) for n in (0, 7, 91)]
    assert batch["labels"].tolist() == [list(range(n + 1, n + 9)) for n in (0, 7, 91)]
    assert batch["tokens"].dtype == torch.long


def test_training_offsets_depend_on_seed_step_and_index_only(text_data):
    """The same call gives the same samples; another step or seed gives others; all fit into the text."""
    offsets = text_data.training_offsets(1, 5, 64, num_bytes=1000, seq_length=100)
    assert offsets == text_data.training_offsets(1, 5, 64, num_bytes=1000, seq_length=100)
    assert offsets[:8] == text_data.training_offsets(1, 5, 8, num_bytes=1000, seq_length=100)
    assert offsets != text_data.training_offsets(1, 6, 64, num_bytes=1000, seq_length=100)
    assert offsets != text_data.training_offsets(2, 5, 64, num_bytes=1000, seq_length=100)
    assert all(0 <= offset <= 1000 - 101 for offset in offsets)


def test_smallest_text_has_one_sample(text_data):
    """A text of seq_length + 1 bytes gives its only window, for training and for validation."""
    assert set(text_data.training_offsets(1, 1, 8, num_bytes=65, seq_length=64)) == {0}
    assert set(text_data.validation_offsets(8, num_bytes=65, seq_length=64)) == {0}


def test_validation_offsets_spread_over_the_text(text_data):
    """Evenly from the first byte to nearly the last, and no further."""
    offsets = text_data.validation_offsets(10, num_bytes=10_101, seq_length=100)
    assert offsets == [n * 1000 for n in range(10)]


@pytest.mark.parametrize(("dp", "micro_batch"), [(1, 16), (1, 4), (2, 4), (4, 2), (8, 2)])
def test_every_layout_covers_the_global_batch_once(text_data, dp, micro_batch):
    """The ranks' microbatches together are the samples 0..15, each exactly once."""
    num_microbatches = 16 // (dp * micro_batch)
    seen = [
        index
        for rank in range(dp)
        for number in range(num_microbatches)
        for index in text_data.microbatch_indices(number, rank, dp, micro_batch)
    ]
    assert sorted(seen) == list(range(16))


def test_decode_gives_text_that_is_safe_to_print(text_data):
    """UTF-8 survives; half letters and control bytes (which could command a terminal) do not."""
    assert text_data.decode(list("déf\n\tx".encode())) == "déf\n\tx"
    assert text_data.decode([0x1B, 0x5B, 0x41, 0xC3]) == "\ufffd[A\ufffd"
