"""Say in words what the images of a data set show: caption files for methods that read text.

python tools/caption.py --cfg sysu.yaml --set data.root=/data/SYSU-MM01 --captioner models/blip --paraphraser models/llm

The captioner (BLIP) describes every image; the paraphraser, any causal language model, says the same in other words. Both
are folders as transformers saves them, or names on the hub with --download. What is finished is kept: the same command
goes on after an interruption, and describes images that were added.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# To be said before torch loads: threads that spin while they wait cost tenfold where something else holds a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from PIL import Image
from tqdm import tqdm

from engine import config, data
from engine.data import cache, captions
from engine.data.dataset import Dataset
from engine.device import pick_device
from engine.errors import UserError, run_tool

SAVE_SECONDS = 60.0  # the work that a crash may cost
DESCRIPTION_TOKENS, PARAPHRASE_TOKENS = 40, 60  # at most; CLIP's text encoder reads 77 in all
INSTRUCTION = (
    "Say this description of a person in other words, in one sentence, and add nothing to it. "
    "Answer with that sentence alone."
)

Write = Callable[[Sequence[str]], list[str]]
"""What a model writes about a batch: of image files (captioner) or of captions (paraphraser)."""


@dataclass(frozen=True)
class Book:
    """The caption file of one modality.

    Attributes:
        paths: the images to be described, absolute.
        texts: path -> (caption, paraphrase), "" for what is still to be written.
    """

    file: Path
    root: Path
    paths: list[str]
    texts: dict[str, tuple[str, str]]

    def undescribed(self) -> list[str]:
        return [path for path in self.paths if not self.texts.get(path, ("", ""))[0]]

    def unparaphrased(self) -> list[str]:
        """Different captions without a paraphrase: what captioners say of many images is the same."""
        rows = (self.texts.get(path, ("", "")) for path in self.paths)
        return list(dict.fromkeys(caption for caption, paraphrase in rows if caption and not paraphrase))

    def save(self) -> None:
        captions.save(self.file, self.root, self.texts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", metavar="NAME", required=True, help="the configuration whose images are described")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="change one setting")
    parser.add_argument("--captioner", metavar="MODEL", default="", help="BLIP, while there are images to describe")
    parser.add_argument("--paraphraser", metavar="MODEL", default="", help="without one, paraphrases wait for later")
    parser.add_argument("--prompt", default="", help="words that every description begins with")
    parser.add_argument("--download", action="store_true", help="fetch models from the hub")
    parser.add_argument("--out", metavar="DIR", default="", help="folder of the caption files (default: data.root)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--batch", metavar="N", type=int, default=32, help="images at a time (default: 32)")
    arguments = parser.parse_args()
    if arguments.batch < 1:
        parser.error(f"--batch must be at least 1, got {arguments.batch}")
    settings = config.load(arguments.cfg, arguments.set).data
    books = open_books(data.read(settings), settings.root, arguments.out)
    device = pick_device(arguments.device)
    try:
        describe(books, arguments, device)
        paraphrase(books, arguments, device)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{device} has no memory for {arguments.batch} images at a time: lower --batch") from error
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    for book in books:
        print(
            f"{book.file}: {len(book.paths)} images, {len(book.undescribed())} without description, "
            f"{len(book.unparaphrased())} captions without paraphrase"
        )
    return 0


def open_books(dataset: Dataset, root: str, out: str) -> list[Book]:
    """The books of both modalities, with what their files hold already."""
    base = Path(os.path.abspath(Path(root).expanduser()))
    books = []
    for modality, name in (("vis", captions.FILES.vis), ("ir", captions.FILES.ir)):
        parts = [pair[modality].paths for pair in (dataset.train, dataset.test) if pair]
        paths = list(dict.fromkeys(os.path.abspath(path) for part in parts for path in part))
        file = Path(out).expanduser() / name if out else base / name
        books.append(Book(file, base, paths, captions.load(file, base) if file.exists() else {}))
    return books


def describe(books: Sequence[Book], arguments: argparse.Namespace, device: torch.device) -> None:
    """Write a caption of every image that has none."""
    count = sum(len(book.undescribed()) for book in books)
    if not count:
        return
    if not arguments.captioner:
        raise UserError(f"--captioner: {count} images have no description yet; name a model. {BLIP}")
    write = load_captioner(arguments.captioner, arguments.download, device, arguments.prompt)
    for book in books:

        def step(paths: Sequence[str], book: Book = book) -> None:
            book.texts.update((path, (text, "")) for path, text in zip(paths, write(paths), strict=True))

        work(f"describing for {book.file.name}", book.undescribed(), step, book.save, arguments.batch)


def paraphrase(books: Sequence[Book], arguments: argparse.Namespace, device: torch.device) -> None:
    """Write a paraphrase of every caption that has none."""
    if not arguments.paraphraser or not any(book.unparaphrased() for book in books):
        return
    write = load_paraphraser(arguments.paraphraser, arguments.download, device)
    known = dict(row for book in books for row in book.texts.values() if all(row))
    for book in books:

        def step(texts: Sequence[str]) -> None:
            new = [text for text in texts if text not in known]
            known.update(zip(new, write(new), strict=True) if new else ())

        def save(book: Book = book) -> None:
            book.texts.update(
                (path, (text, known.get(text, ""))) for path, (text, other) in book.texts.items() if not other
            )
            book.save()

        work(f"paraphrasing for {book.file.name}", book.unparaphrased(), step, save, arguments.batch)


def work(
    label: str, items: Sequence[str], step: Callable[[Sequence[str]], None], save: Callable[[], None], size: int
) -> None:
    """`step` through the items in batches, and `save` every now and then and however it ends."""
    if not items:
        return
    save()  # a folder that cannot be written to shows before the work
    saved = time.monotonic()
    with tqdm(total=len(items), desc=label, disable=None) as progress:
        try:
            for start in range(0, len(items), size):
                part = items[start : start + size]
                step(part)
                progress.update(len(part))
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
        finally:
            save()


# The models

BLIP = (
    "--captioner takes BLIP as transformers saves it, for example from "
    "`hf download Salesforce/blip-image-captioning-base --local-dir models/blip`"
)
LLM = (
    "--paraphraser takes any causal language model as transformers saves it, for example from "
    "`hf download Qwen/Qwen2.5-1.5B-Instruct --local-dir models/llm`"
)


def load_captioner(name: str, download: bool, device: torch.device, prompt: str) -> Write:
    """A function that describes image files."""
    processor, model = load(name, download, device, BLIP, "AutoProcessor", "AutoModelForImageTextToText")
    if not hasattr(processor, "image_processor"):
        raise UserError(f"{name}: it has no image processor. {BLIP}")

    @torch.inference_mode()
    def write(paths: Sequence[str]) -> list[str]:
        texts = {"text": [prompt] * len(paths)} if prompt else {}
        inputs = processor(images=[open_image(path) for path in paths], return_tensors="pt", **texts)
        tokens = model.generate(
            **inputs.to(device, model.dtype), max_new_tokens=DESCRIPTION_TOKENS, do_sample=False, num_beams=1
        )
        return [" ".join(text.split()) for text in processor.batch_decode(tokens, skip_special_tokens=True)]

    return write


def load_paraphraser(name: str, download: bool, device: torch.device) -> Write:
    """A function that says captions in other words; a caption for which the model finds none stays as it is."""
    tokenizer, model = load(name, download, device, LLM, "AutoTokenizer", "AutoModelForCausalLM")
    tokenizer.padding_side = "left"  # what is written goes on from the end of the prompt
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    chats = bool(tokenizer.chat_template)

    def prompt(text: str) -> str:
        if not chats:
            return f"A description of a person: {text}.\nThe same in other words:"
        turn = {"role": "user", "content": f"{INSTRUCTION}\n{text}"}
        return tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True, enable_thinking=False)

    @torch.inference_mode()
    def write(texts: Sequence[str]) -> list[str]:
        inputs = tokenizer(
            [prompt(text) for text in texts], return_tensors="pt", padding=True, add_special_tokens=not chats
        ).to(device)
        tokens = model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=PARAPHRASE_TOKENS,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [sentence(answer) or text for answer, text in zip(answers, texts, strict=True)]

    return write


def load(name: str, download: bool, device: torch.device, remedy: str, *classes: str) -> tuple[Any, Any]:
    """A processor or tokenizer, and a model, by the names of their classes in transformers."""
    try:
        import transformers

        preparer, maker = (getattr(transformers, each) for each in classes)
    except (ImportError, AttributeError) as error:  # it is not there, or too old
        raise UserError(f'captions are written by transformers ({error}): pip install "vireid-engine[firm]"') from error
    place = Path(name).expanduser()
    source = str(place) if place.is_dir() else name
    dtype = torch.float32 if device.type == "cpu" else "auto"
    access = {"local_files_only": not download, "trust_remote_code": False}
    try:
        prepare = preparer.from_pretrained(source, **access)
        model, found = maker.from_pretrained(source, dtype=dtype, output_loading_info=True, **access)
    except Exception as error:  # damaged or foreign folders fail in many ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = "damaged, or another kind of model" if place.is_dir() else "no such folder"
        raise UserError(
            f"{name}: {where} ({reason[:300]}). {remedy}; or add --download to fetch a model by its name on the hub"
        ) from error
    if found["missing_keys"]:
        missing = min(found["missing_keys"])
        raise UserError(f"{name}: {len(found['missing_keys'])} weights are missing, such as {missing}. {remedy}")
    return prepare, model.to(device).eval()


def open_image(path: str) -> Image.Image:
    try:
        return cache.open_image(path)
    except Exception as error:  # Pillow's decoders raise much more than OSError on damaged files
        raise UserError(f"{path} cannot be read ({error}); replace it from the data set's archive") from error


def sentence(answer: str) -> str:
    """The first line that is not an announcement of what follows, without quotation marks."""
    lines = (line.strip(" \t\"'*“”") for line in answer.splitlines())
    return " ".join(next((line for line in lines if line and not line.endswith(":")), "").split())


if __name__ == "__main__":
    run_tool(main)
