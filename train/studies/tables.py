"""Write the tables of a study in Markdown, beside the numbers of the paper.

The paper is PaLI (arXiv 2209.06794): ablations of PaLI-3B with 200 M examples, languages of a 1.5B model, scaling of
section 4.5, and language-only scores of PaLI-17B against mT5-XXL.
"""

from collections.abc import Callable, Mapping, Sequence

from train.studies.read import SCORES, Measured, Results, difference

OBJECTIVES = tuple(SCORES)
NOT_YET = "–"  # not evaluated yet
# COCO, TextVQA, VQAv2, XM3600 English / 6 languages, VQG fine-tuned: the paper's ablation of objectives.
PAPER_HEADS = ("COCO", "TextVQA", "VQAv2", "XM3600 en / 6 others", "VQG zero-shot")
PAPER_OBJECTIVES = {
    "full": ("141.4", "41.6", "76.0", "93.8 / 42.5", "96.7"),
    "without_split_captioning": ("140.4", "38.8", "75.5", "87.5 / 41.5", "86.3"),
    "without_captioning": ("140.5", "41.2", "75.9", "94.9 / 39.9", "101.3"),
    "without_ocr": ("142.3", "39.9", "75.9", "95.4 / 43.6", "92.5"),
    "without_vqa": ("140.9", "40.0", "75.9", "93.9 / 42.7", "94.1"),
    "without_vqg": ("141.4", "41.3", "75.8", "95.1 / 42.0", "17.9"),
}
PAPER_TOWERS = {"full": ("141.4", "41.6", "93.8 / 42.5"), "scratch": ("72.8", "12.8", "22.1 / 10.1")}
PAPER_VIT = {"full": ("139.3", "141.4"), "vit_trained": ("138.8", "140.1")}
PAPER_LANGUAGES = {"full": ("92.2 / 41.9", "45.1 / 41.3"), "english": ("86.0 / 8.2", "40.6 / 34.0")}
PAPER_TEXT = {"before": ("89.3", "84.5", "81.6"), "full": ("88.2", "84.9", "81.2")}
NAMES = {
    "full": "full: both towers, ViT frozen",
    "scratch": "from scratch: no tower, all trained",
    "mt5_from_scratch": "ViT's tower alone, mT5 from scratch",
    "vit_trained": "both towers, ViT trained",
    "english": "English alone",
}


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; all columns but the first are numbers."""
    lines = [heads, ["---", *("---:" for _ in heads[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(measured: Measured | None) -> str:
    """Return a score, or that there is none."""
    return measured.text() if measured else NOT_YET


def blind(results: Results, objectives: Sequence[str] = OBJECTIVES) -> list[str]:
    """Return the row of the full cell's scores on blank images."""
    found = [results.cell(objective, "full") for objective in objectives]
    shown = [f"{one.blind:.1f}" if one and one.blind is not None else "" for one in found]
    return ["full, on blank images", *shown]


def compared(results: Results, cells: Sequence[str], paper: Mapping[str, tuple[str, ...]], heads: Sequence[str]) -> str:
    """Return a table of the scores of some cells, beside the paper's."""
    rows = []
    for cell in cells:
        scores = [text(results.cell(objective, cell)) for objective in OBJECTIVES]
        rows.append([NAMES[cell], *scores, *paper.get(cell, ("",) * len(heads))])
    rows.append([*blind(results), *("" for _ in heads)])
    return table(["cell", *OBJECTIVES, *(f"paper: {head}" for head in heads)], rows)


def towers(results: Results) -> str:
    """Compare towers that are pretrained apart with a model from scratch."""
    heads = ("COCO", "TextVQA", "XM3600 en / 6 others")
    return compared(results, ("full", "mt5_from_scratch", "scratch"), PAPER_TOWERS, heads)


def vit(results: Results) -> str:
    """Compare a frozen ViT with a trained one."""
    return compared(results, ("full", "vit_trained"), PAPER_VIT, ("3B, COCO", "15B, COCO"))


def objectives(results: Results) -> str:
    """Compare every objective left out with the full mixture: differences in points."""
    base = {objective: results.cell(objective, "full") for objective in OBJECTIVES}
    rows = [["full", *(text(base[objective]) for objective in OBJECTIVES), *PAPER_OBJECTIVES["full"]]]
    for left_out in OBJECTIVES:
        cell = f"without_{left_out}"
        shown = [left_out_score(results, cell, objective, base[objective]) for objective in OBJECTIVES]
        rows.append([f"without {left_out}", *shown, *PAPER_OBJECTIVES.get(cell, ("",) * len(PAPER_HEADS))])
    return table(["cell", *OBJECTIVES, *(f"paper: {head}" for head in PAPER_HEADS)], rows)


def left_out_score(results: Results, cell: str, objective: str, base: Measured | None) -> str:
    """Return the difference of a cell's score from the full one's."""
    own = results.cell(objective, cell)
    return difference(own, base).text() if own and base else NOT_YET


def languages(results: Results) -> str:
    """Compare training on English alone with all languages: scores on English, and on the others."""
    of_languages = ("vqa", "ocr", "captioning", "split_captioning", "vqg", "span_corruption")
    rows = []
    for cell in ("full", "english"):
        shown = []
        for objective in of_languages:
            english = results.cell(objective, cell, lambda code: code == "en")
            others = results.cell(objective, cell, lambda code: code != "en")
            shown.append(f"{english.text()} / {others.text()}" if english and others else NOT_YET)
        rows.append(["all languages" if cell == "full" else NAMES[cell], *shown, *PAPER_LANGUAGES[cell]])
    heads = [f"{objective}: en / others" for objective in of_languages]
    return table(["cell", *heads, "paper: XM3600 en / 6 others", "paper: xGQA en / others"], rows)


def second_phase(results: Results) -> str:
    """Compare resolutions of a second phase, and the run before it."""
    own = ("ocr", "vqa", "captioning")
    rows = [["before it", *(text(results.cell(objective, "full")) for objective in own)]]
    sweep = results.sweeps.get("second_phase")
    key = "phases.study.image_size"
    for size in sweep.config.over[key] if sweep else ():
        scores = (results.score(objective, "second_phase", {key: size}) for objective in own)
        rows.append([f"after it, {size} px", *(text(score) for score in scores)])
    return table(["cell", *own], rows)


def text_only(results: Results) -> str:
    """Compare span corruption of text before and after the training with images."""
    towers = results.sweeps.get("mt5s") or results.sweeps.get("text_before")
    before = results.score("span_corruption", "mt5s", towers.cells()[0].values) if towers else None
    rows = [["the mT5 alone, before", text(before), *PAPER_TEXT["before"]]]
    for cell, name in (("full", "full, after"), ("without_span_corruption", "without span_corruption, after")):
        after = results.cell("span_corruption", cell)
        rows.append([name, text(after), *PAPER_TEXT.get(cell, ("", "", ""))])
    prior = f"{before.blind:.1f}" if before and before.blind is not None else ""
    rows.append(["another text's target", prior, "", "", ""])
    return table(["", "span_corruption", "paper: SuperGLUE", "paper: XNLI", "paper: XQuAD"], rows)


def scaling(results: Results) -> str:
    """Compare sizes of both towers by VQA."""
    sweep = results.sweeps.get("scaling")
    if sweep is None:
        return NOT_YET
    (vit_key, vits), (mt5_key, mt5s) = [item for item in sweep.over.items() if item[0] != "run.seed"][:2]
    rows = []
    for vit_size in reversed(vits):
        scores = (results.score("vqa", "scaling", {vit_key: vit_size, mt5_key: mt5}) for mt5 in reversed(mt5s))
        rows.append([f"ViT {vit_size}", *(text(score) for score in scores)])
    return table(["vqa", *(f"mT5 {mt5}" for mt5 in reversed(mt5s))], rows)


def state(results: Results) -> str:
    """Return a table of the sweeps: runs, steps, and how many of them are there."""
    rows = []
    for sweep in results.sweeps.values():
        cells = sweep.cells()
        trained = sum(cell.trained for cell in cells)
        evaluated = str(sum(cell.evaluated for cell in cells)) if sweep.config.evaluate else ""
        rows.append([sweep.name, str(len(cells)), str(sweep.steps), str(trained), evaluated])
    return table(["sweep", "runs", "steps of each", "trained", "evaluated"], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "state": state,
    "towers": towers,
    "vit": vit,
    "objectives": objectives,
    "languages": languages,
    "second_phase": second_phase,
    "text_only": text_only,
    "scaling": scaling,
}
