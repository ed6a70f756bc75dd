"""The text that pretrain_gpt.py trains on, as bytes, with no download and no tokenizer to install.

By default this is the source code of Python's own standard library, which is on every machine that can run
the script at all; `--data FILE...` takes its place with the user's own text. Nothing here needs a GPU.

Everything is deterministic. The files are found, ordered and split by their *names* only, so two ranks (or
two runs) never disagree about what is training text and what is validation text. A training sample is a
function of (seed, step, index in the global batch) and of nothing else: however many ranks share the global
batch, they see the same one, and a run resumed at step 500 continues with the batch of step 500.

Legend: b samples, s bytes of one sample.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

VOCAB_SIZE = 256  # one token is one byte
END_OF_FILE = 0  # stands between two files; text files do not contain it
VALIDATION_PERCENT = 5
MAX_BYTES = 64 * 2**20

# Test suites come with some Python installations and not with others; third-party packages are not ours.
LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class TextError(Exception):
    """The text cannot be used; the message says which file, why, and what to do."""


@dataclass(frozen=True)
class Text:
    """One corpus, split into two runs of bytes (uint8 tensors), and a line that says where it came from."""

    train: torch.Tensor
    validation: torch.Tensor
    description: str


# --------------------------------------------------------------------------------------- which files


def standard_library_files() -> dict[str, Path]:
    """Name -> path of every source file of the standard library; the name is relative, so portable."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if not LEFT_OUT_FOLDERS.intersection(name.parts[:-1]):
            files[name.as_posix()] = path
    if len(files) < 2:
        raise TextError(f"no Python sources under {root}; name text files of your own with --data FILE...")
    return files


def user_files(names: list[str]) -> dict[str, Path]:
    """Name -> path of the files given on the command line, each of them checked."""
    files = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            raise TextError(f"--data {name}: this is a folder; name files, for example {name}/*.txt")
        if not path.is_file():
            raise TextError(f"--data {name}: there is no such file")
        files[path.as_posix()] = path
    return files


def name_hash(name: str) -> int:
    """A number that depends on the name alone, on every machine and in every process (hash() does not)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def split_by_file(names: list[str]) -> tuple[list[str], list[str]]:
    """(training, validation) names, both in the order of their hashes.

    About five in a hundred files validate, and at least one does; a whole file is on one side or the other,
    so the validation loss is measured on text that the model has never met.
    """
    ordered = sorted(names, key=name_hash)
    validation = [name for name in ordered if name_hash(name) % 100 < VALIDATION_PERCENT] or ordered[:1]
    return [name for name in ordered if name not in set(validation)], validation


# -------------------------------------------------------------------------------- bytes of the files


def read_files(paths: list[Path], max_bytes: int) -> bytes:
    """The files one after another, END_OF_FILE after each, cut at `max_bytes`."""
    text = bytearray()
    for path in paths:
        try:
            text += path.read_bytes()
        except OSError as error:
            raise TextError(f"cannot read {path}: {error.strerror}") from error
        text.append(END_OF_FILE)
        if len(text) >= max_bytes:
            break
    return bytes(text[:max_bytes])


def as_tokens(text: bytes) -> torch.Tensor:
    """Bytes -> uint8 tensor; a bytearray because a tensor must be able to own what it shows."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def decode(tokens: list[int]) -> str:
    """Tokens -> text that is safe to print: what is no letter, mark, space or line end shows as \\ufffd."""
    text = bytes(tokens).decode("utf-8", errors="replace")
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def load_text(data: list[str] | None, seq_length: int, max_bytes: int = MAX_BYTES) -> Text:
    """Read and split the corpus: the standard library, or the files in `data`.

    Several files are split by file. A single file cannot be, so its last tenth validates.

    Raises: TextError where a file is missing or unreadable, or where a side is too short for one sample.
    """
    files = user_files(data) if data else standard_library_files()
    if len(files) == 1:
        text = read_files(list(files.values()), max_bytes)
        cut = len(text) - len(text) // 10
        train, validation = text[:cut], text[cut:]
        split = "first nine tenths train, last tenth validates"
    else:
        train_names, validation_names = split_by_file(list(files))
        train = read_files([files[name] for name in train_names], max_bytes)
        validation = read_files([files[name] for name in validation_names], max_bytes)
        split = f"{len(train_names)} files train, {len(validation_names)} validate"
    for side, text in (("training", train), ("validation", validation)):
        if len(text) <= seq_length:
            raise TextError(
                f"the {side} text has {len(text)} bytes, and one sample needs {seq_length + 1}: "
                "give more text with --data, or a smaller --seq-length"
            )
    source = "given files" if data else "Python standard library"
    size = f"{len(train) / 1e6:.1f} MB to train, {len(validation) / 1e6:.1f} MB to validate"
    return Text(as_tokens(train), as_tokens(validation), f"{source}: {split}; {size}")


# ------------------------------------------------------------------------------------------- samples


def samples_at(text: torch.Tensor, offsets: list[int], seq_length: int) -> dict[str, torch.Tensor]:
    """Tokens [b, s] that start at `offsets`, and as labels [b, s] the byte that follows each of them."""
    windows = torch.stack([text[offset : offset + seq_length + 1] for offset in offsets]).long()
    return {"tokens": windows[:, :-1].contiguous(), "labels": windows[:, 1:].contiguous()}


def training_offsets(seed: int, step: int, num_samples: int, num_bytes: int, seq_length: int) -> list[int]:
    """Where each sample of the global batch of `step` starts: drawn evenly over the text, from a hash."""
    return [name_hash(f"{seed}/{step}/{index}") % (num_bytes - seq_length) for index in range(num_samples)]


def validation_offsets(num_samples: int, num_bytes: int, seq_length: int) -> list[int]:
    """Where each validation sample starts: at equal distances over the whole text, the same for every run."""
    return [index * (num_bytes - seq_length - 1) // num_samples for index in range(num_samples)]


def microbatch_indices(
    microbatch: int, data_parallel_rank: int, data_parallel_size: int, micro_batch_size: int
) -> range:
    """The samples of the global batch that one data-parallel rank takes as its n-th microbatch."""
    first = (microbatch * data_parallel_size + data_parallel_rank) * micro_batch_size
    return range(first, first + micro_batch_size)
