"""The study's page: its numbers against hand-made results, its words, and its HTML."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pruning_vs_quantization import layer_study, report
from pruning_vs_quantization.fine_tuning_table import Result
from pruning_vs_quantization.report import (
    Section,
    answer,
    html_page,
    join_words,
    markdown_page,
    summary_table,
)
from pruning_vs_quantization.study_files import TextTable, signed, write_result

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)  # noqa: E501


# -- hand-made results -----------------------------------------------------------------------------


def write_weights(folder: Path, model: str, bits: int, pairs: list[tuple]) -> None:
    layers = {
        f"layer{i}": {
            "quant_sqnr": quant,
            "pruning_sqnr": pruning,
            "pruning_sqnr_corrected": pruning,
            "sample_kurtosis": float(i),
        }
        for i, (quant, pruning) in enumerate(pairs)
    }
    (folder / "weights_sqnr").mkdir(parents=True, exist_ok=True)
    path = folder / "weights_sqnr" / f"{model}_{bits}_bits_mse.json"
    path.write_text(json.dumps(layers))


def write_outputs(folder: Path, layer: str, bits: int, quantised: tuple, pruned: tuple) -> None:
    """Each of (signal, own error, best error, bound), as layer_study.py sums them up."""
    for kind, own, (signal, error, best, bound) in (
        ("quantisation", "obq", quantised),
        ("pruning", "exact_obs", pruned),
    ):
        record = {
            "signal": signal,
            "errors": {own: error},
            "error": best,
            "lower": bound,
            "proven": best == bound,
            "seconds": 0.0,
        }
        figures = {
            "kind": kind,
            "layer": layer,
            "bits": bits,
            "summary": layer_study.layer_summary([record], kind),
        }
        path = folder / "layer_outputs" / f"rn8_{layer}_{bits}_bits_{kind}.json"
        write_result(path, {"model": "rn8", "dataset": "digits"}, figures)


def write_training(
    folder: Path,
    architecture: str,
    tops: dict[tuple[str, int], list[float]],
    test_images: int | None = 10_000,
    classes: int | None = 10,
    dense: float | None = None,
    **pruned_with: object,  # conditions of the pruned networks that differ
):
    def shared(method: str) -> dict | None:
        own = pruned_with if method == "pruned" else {}
        common = {"weights": "/rn8.pth", "max_epochs": 3, "training_images": 1437}
        return common | {"test_images": test_images} | own if test_images else None

    results = [
        Result(
            method, bits, top1, seed, 60.0, classes=classes, shared=shared(method), dense_top1=dense
        )
        for (method, bits), values in tops.items()
        for seed, top1 in enumerate(values)
    ]
    record = {
        "architecture": architecture,
        "dataset": "digits",
        "conditions": "trained briefly",
        "results": [asdict(one) for one in results],
    }
    (folder / "fine_tuning").mkdir(parents=True, exist_ok=True)
    stem = folder / "fine_tuning" / f"table_{architecture.partition('_')[0]}_digits"
    stem.with_suffix(".json").write_text(json.dumps(record))
    stem.with_suffix(".png").write_bytes(PNG)


@pytest.fixture
def results(tmp_path) -> Path:
    write_weights(tmp_path, "rn8", 4, [(20.0, 5.0), (18.0, 6.0), (10.0, 9.0), (None, 4.0)])
    write_weights(tmp_path, "rn8", 2, [(5.0, 6.0), (8.0, 3.0), (7.0, 7.5)])
    write_weights(tmp_path, "resnet18", 4, [(11.0, 1.0)])
    write_outputs(tmp_path, "conv1", 4, (100.0, 2.0, 1.0, 1.0), (100.0, 20.0, 10.0, 5.0))
    write_outputs(tmp_path, "conv2", 4, (100.0, 1.0, 1.0, 0.5), (100.0, 1.0, 1.0, 0.1))
    write_training(
        tmp_path,
        "rn8_quantized",
        {
            ("quantised", 4): [99.0, 98.0],
            ("pruned", 4): [97.0],
            ("quantised", 2): [90.0],
            ("pruned", 2): [95.0],
            ("OBQ", 2): [80.0],
        },
    )
    return tmp_path


def section_of(folder: Path, part: str, model: str | None = None) -> Section:
    (found,) = [each for each in report.study_sections([folder], model) if each.part == part]
    return found


# -- numbers ---------------------------------------------------------------------------------------


def test_weights_are_medians_over_finite_tensors(results):
    section = section_of(results, "weights", "rn8")
    assert section.gaps == {4: 12.0, 2: -0.5}  # of 15, 12, 1; of −1, 5, −0.5
    assert section.tables[0].rows == [
        ["4", "75 %", "3", "18.00", "6.00", "0"],
        ["2", "87.5 %", "3", "7.00", "6.00", "2"],
    ]
    assert section.tables[1].rows[0] == ["rn8", "layer0", "2", "0.0", "−1.00 dB"]
    assert section.pictures[0][1].startswith(b"\x89PNG")


def test_all_models_or_one_by_either_name(results):
    assert section_of(results, "weights").subject == "2 models"
    assert section_of(results, "weights").gaps[4] == 11.0  # of 15, 12, 1, 10
    assert section_of(results, "weights", "rn18").gaps == {4: 10.0}
    assert section_of(results, "weights", "resnet18").gaps == {4: 10.0}


def test_layer_outputs_say_what_is_proven(results):
    section = section_of(results, "layer outputs")
    assert section.subject == "rn8 on digits"
    assert section.gaps == {4: pytest.approx(5.0)}  # 10 dB in conv1, 0 in conv2
    row = section.tables[0].rows[0]
    assert row[:4] == ["4", "75 %", "2", "+5.00 dB"]
    assert row[4:6] == ["1", "0"]  # conv1's best 20 dB passes the limit of 13 dB
    assert row[6:] == ["1.51 dB", "1.51 dB"]  # 3.01 dB in conv1, 0 in conv2; the same


def test_layer_outputs_have_a_table_per_layer(results):
    write_outputs(results, "conv10", 2, (100.0, 2.0, 1.0, 1.0), (100.0, 20.0, 10.0, 10.0))
    write_outputs(results, "conv2", 2, (100.0, 0.0, 0.0, 0.0), (100.0, 20.0, 10.0, 10.0))
    table = section_of(results, "layer outputs").tables[1]
    assert table.folded
    assert table.rows == [
        ["conv1", "4", "1 of 2", "20.00", "10.00 … 13.01", "+10.00 dB", "3.01", "≥ 3.01"],
        ["conv2", "4", "0 of 2", "20.00 … 23.01", "20.00 … 30.00", "+0.00 dB", "≥ 0.00", "≥ 0.00"],
        ["conv2", "2", "2 of 2", "∞", "10.00", "+∞ dB", "0.00", "3.01"],
        ["conv10", "2", "2 of 2", "20.00", "10.00", "+10.00 dB", "3.01", "3.01"],
    ]


def test_layers_without_error_are_infinitely_good(tmp_path):
    write_outputs(tmp_path, "conv1", 8, (1.0, 0.0, 0.0, 0.0), (1.0, 0.1, 0.1, 0.1))
    section = section_of(tmp_path, "layer outputs")
    assert section.gaps == {8: math.inf}
    assert section.tables[0].rows[0][3:6] == ["+∞ dB", "1", "0"]
    write_outputs(tmp_path, "conv1", 8, (1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0))
    assert section_of(tmp_path, "layer outputs").gaps == {8: 0.0}


def test_a_layer_that_only_one_side_has_seen_does_not_count(tmp_path, caplog):
    write_outputs(tmp_path, "conv1", 4, (1.0, 0.1, 0.1, 0.1), (1.0, 0.2, 0.2, 0.2))
    (tmp_path / "layer_outputs" / "rn8_conv1_4_bits_pruning.json").unlink()
    assert report.study_sections([tmp_path], None) == []
    assert "1 of 1 layers and bit widths are quantised or pruned only" in caplog.text


def test_fine_tuning_compares_means_over_seeds(results):
    section = section_of(results, "fine-tuning")
    assert section.gaps == {4: 1.5, 2: -5.0}
    assert section.unit == "points" and section.pictures[0][1] == PNG
    assert section.tables[0].rows[1][:5] == ["2", "87.5 %", "90.00", "95.00", "80.00"]
    assert "dense" not in section.text


def test_the_dense_network_comes_first(tmp_path):
    tops = {("quantised", 4): [98.0, 97.0], ("pruned", 4): [97.0], ("OBQ", 4): [96.0]}
    write_training(tmp_path, "rn8_quantized", tops, dense=98.5)
    section = section_of(tmp_path, "fine-tuning")
    assert section.text == "Top-1 in percent; dense 98.50; trained briefly."
    assert section.tables[0].rows == [
        ["dense", "0 %", "98.50", "98.50", "98.50", "–", "–", "–"],
        ["4", "75 %", "97.50 (97.00 … 98.00)", "97.00", "96.00", "–", "0 1", "1.0"],
    ]


# -- words -----------------------------------------------------------------------------------------


def part(name: str, unit: str = "dB", **gaps: float) -> Section:
    return Section(name, "rn8", unit, {float(bits[1:]): gap for bits, gap in gaps.items()}, "")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            [part("weights", b4=13.0, b2=5.0)],
            "Quantise. By weights, rn8: quantisation is better at 4 bits (+13.00 dB) and "
            "2 bits (+5.00 dB).",
        ),
        (
            [part("weights", b4=-13.0)],
            "Prune. By weights, rn8: pruning is better at 4 bits (−13.00 dB).",
        ),
        (
            [part("weights", b4=0.05)],
            "Either will do. By weights, rn8: neither is clearly better at 4 bits (+0.05 dB).",
        ),
        (
            [part("weights", b4=13.0, b2=5.0), part("fine-tuning", "points", b4=1.5, b2=-5.0)],
            "It depends on the size. By fine-tuning, rn8: quantisation is better at 4 bits "
            "(+1.50 points); pruning is better at 2 bits (−5.00 points). "
            "Otherwise by weights, rn8, at 2 bits (+5.00 dB).",
        ),
        (
            [part("densities", b4=13.0), part("weights", b4=5.0, b2=3.0)],
            "Quantise. By weights, rn8: quantisation is better at 4 bits (+5.00 dB) and "
            "2 bits (+3.00 dB). The other parts that have been run agree.",
        ),
    ],
)
def test_the_answer_depends_on_the_numbers(sections, words):
    assert answer(sections) == words


def fine_tuned(folder: Path, quantised: float, pruned: float, **conditions) -> str:
    """The answer from networks of 4 bits."""
    tops = {("quantised", 4): [quantised], ("pruned", 4): [pruned]}
    write_training(folder, "rn8_quantized", tops, **conditions)
    return answer(report.study_sections([folder], None))


@pytest.mark.parametrize(
    ("quantised", "pruned", "images", "clear"),
    [  # 2σ = 200 √((p(1 − p) + q(1 − q)) / n) points
        (90.0, 96.0, 360, True),  # 3.77
        (90.0, 93.0, 360, False),  # 4.15
        (90.0, 93.0, 1000, True),  # 2.49
        (50.0, 51.0, 10_000, False),  # 1.41
        (50.0, 51.0, 50_000, True),  # 0.63
        (100.0, 99.0, 360, False),  # 1.05
    ],
)
def test_a_verdict_needs_enough_test_images(quantised, pruned, images, clear, tmp_path):
    text = fine_tuned(tmp_path, quantised, pruned, test_images=images)
    assert clear == ("is better" in text) == ("No verdict." not in text)
    if not clear:
        limit = 2 * math.sqrt(sum(p * (100 - p) for p in (quantised, pruned)) / images)
        assert f"{images} test images tell only differences above {limit:.2f} points" in text


@pytest.mark.parametrize(
    ("quantised", "pruned", "conditions", "why"),
    [
        (12.0, 20.0, {"test_images": 360}, "the quantised network, 12.00 % right, is not above"),
        (50.0, 10.0, {}, "the pruned network, 10.00 % right, is not above chance, 10 %"),
        (0.15, 5.0, {"classes": 1000}, "not above chance, 0.1 %"),
        (90.0, 99.0, {"test_images": None}, "the number of test images and the conditions are not"),
        (90.0, 99.0, {"classes": None}, "the number of classes is not known"),
        (90.0, 99.0, {"max_epochs": 9}, "not trained alike, max epochs 3 and 9"),
        (90.0, 99.0, {"weights": "/b.pth"}, "not trained alike, weights /rn8.pth and /b.pth"),
        (90.0, 99.0, {"training_images": 720}, "not trained alike, training images 1437 and 720"),
    ],
)
def test_no_verdict_says_what_is_missing(quantised, pruned, conditions, why, tmp_path):
    text = fine_tuned(tmp_path, quantised, pruned, **conditions)
    assert text.startswith("No verdict. By fine-tuning, rn8 on digits: no verdict at 4 bits (")
    assert why in text and "is better" not in text


def test_other_parts_are_named_where_training_gives_no_verdict(tmp_path):
    write_weights(tmp_path, "rn8", 4, [(20.0, 5.0)])
    text = fine_tuned(tmp_path, 11.0, 15.0, test_images=360)
    assert text.startswith("No verdict.") and "Prune." not in text and "agree" not in text
    assert text.endswith("Otherwise by weights, rn8, at 4 bits (+15.00 dB).")


def test_a_verdict_at_one_size_and_none_at_another(tmp_path):
    tops = {("quantised", 4): [98.0], ("pruned", 4): [97.9]}
    tops |= {("quantised", 2): [95.0], ("pruned", 2): [80.0]}
    write_training(tmp_path, "rn8_quantized", tops)
    text = answer(report.study_sections([tmp_path], None))
    assert text.startswith("Quantise. By fine-tuning, rn8 on digits: quantisation is better at 2")
    assert "no verdict at 4 bits (+0.10 points), since 10000 test images" in text


def test_layers_of_other_inputs_are_not_compared(tmp_path, caplog):
    write_outputs(tmp_path, "conv1", 4, (1.0, 0.1, 0.1, 0.1), (1.0, 0.2, 0.2, 0.2))
    path = tmp_path / "layer_outputs" / "rn8_conv1_4_bits_pruning.json"
    path.write_text(path.read_text().replace('"dataset"', '"nsamples": 8, "dataset"'))
    assert report.study_sections([tmp_path], None) == []
    assert "conv1 of rn8 at 4 bits left out: quantised and pruned with another" in caplog.text


def test_published_weights_files_may_hold_nan_and_infinity(tmp_path, capsys):
    """As Python's json writes them by default."""
    figures = {"quant_sqnr": 20.0, "pruning_sqnr": 5.0, "sample_kurtosis": math.nan}
    layers = {
        "a": figures,
        "b": figures | {"quant_sqnr": math.inf},
        "c": figures | {"pruning_sqnr": math.nan},
        "d": figures | {"pruning_sqnr": -math.inf, "quant_sqnr": None},
        "e": {"quant_sqnr": 10, "pruning_sqnr": -2},
    }
    (tmp_path / "weights_sqnr").mkdir()
    (tmp_path / "weights_sqnr" / "resnet18_4_bits_mse.json").write_text(json.dumps(layers))
    section = section_of(tmp_path, "weights", "rn18")
    assert section.gaps == {4: 13.5} and section.tables[0].rows[0][2] == "2"
    assert section.tables[1].rows[0] == ["resnet18", "e", "4", "–", "+12.00 dB"]
    assert report.main([str(tmp_path)]) == 0
    assert "Quantise. By weights, resnet18" in capsys.readouterr().out


def test_the_summary_has_a_row_per_size_and_a_column_per_part():
    sections = [part("weights", b4=13.0, b2=5.0), part("fine-tuning", "points", b3=-0.5, b4=2.0)]
    assert summary_table(sections).rows == [
        ["4", "75 %", "+13.00 dB", "+2.00 points"],
        ["3", "81.25 %", "–", "−0.50 points"],
        ["2", "87.5 %", "+5.00 dB", "–"],
    ]


def test_a_part_without_a_pair_has_no_say():
    one_sided = part("fine-tuning", "points")
    sections = [part("weights", b4=13.0), one_sided]
    assert answer(sections) == answer(sections[:1])
    assert summary_table(sections) == summary_table(sections[:1])
    assert "nothing to compare" in answer([one_sided])


def test_small_words():
    assert [signed(x) for x in (0.0, -0.001, 1.5, -2.0, -math.inf, None)] == [
        "+0.00",
        "+0.00",
        "+1.50",
        "−2.00",
        "−∞",
        "–",
    ]
    assert [join_words(list(words)) for words in ("a", "ab", "abc")] == [
        "a",
        "a and b",
        "a, b and c",
    ]


# -- the page --------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags are closed in order; keeps pictures, links and text."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[dict] = []
        self.addresses: list[str] = []
        self.words = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "img":
            self.pictures.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_the_page_holds_everything_it_shows():
    section = Section(
        "weights",
        "<b>&rn8",
        "dB",
        {4: 1.0},
        "5 < 6 & 7",
        [TextTable(["layer", "gap"], [["<i>x", "+1.00 dB"]])],
        [('a "dot"', PNG)],
    )
    text = html_page("A <title>", [section])
    page = Page(text)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "http" not in text and "url(" not in text and "<script" not in text
    (picture,) = page.pictures
    assert base64.b64decode(picture["src"].partition(",")[2]) == PNG
    assert picture["alt"] == 'a "dot"'
    for words in ("A <title>", "<b>&rn8", "5 < 6 & 7", "<i>x", "Not run: fine-tuning"):
        assert words in page.words
    assert "prefers-color-scheme: dark" in text


def test_long_tables_are_folded():
    section = Section(
        "weights",
        "rn8",
        "dB",
        {4: 1.0},
        "",
        [TextTable(["layer"], [["conv1"]], folded="Layer by layer")],
    )
    text = html_page("Title", [section])
    assert "<summary>Layer by layer</summary>" in text and "conv1" in Page(text).words
    assert "| conv1 |" in markdown_page("Title", [section])


def test_markdown_says_the_same():
    sections = [part("weights", b4=13.0)]
    text = markdown_page("Title", sections)
    assert text.startswith("# Title\n") and answer(sections) in text
    assert "| 4 | 75 % | +13.00 dB |" in text
    assert "Not run: densities. `python -m pruning_vs_quantization.expected_sqnr`" in text


# -- the command -----------------------------------------------------------------------------------


def test_the_command_writes_both_pages(results, capsys, tmp_path):
    assert report.main([str(results), "--model", "rn8", "--out", str(tmp_path / "page")]) == 0
    printed = capsys.readouterr().out
    assert "| 4 | 75 % | +12.00 dB | +5.00 dB | +1.50 points |" in printed
    assert "It depends on the size. By fine-tuning, rn8 on digits" in printed
    page = Page((tmp_path / "page" / "report.html").read_text())
    assert len(page.pictures) == 3 and "Pruning or quantisation? rn8 on digits" in page.words
    markdown = (tmp_path / "page" / "report.md").read_text()
    assert printed.splitlines()[2] in markdown
    assert not (results / "report.html").exists()


def test_a_page_of_several_networks_is_asked_for_and_named_after_none(results, capsys):
    assert report.main([str(results)]) == 2
    error = capsys.readouterr().err
    assert (
        error == f"error: {results}: results of resnet18, rn8; pass --model MODEL, or --model all\n"
    )
    assert not (results / "report.html").exists()
    assert report.main([str(results), "--model", "all"]) == 0
    page = Page((results / "report.html").read_text())
    assert "Pruning or quantisation?\n" in page.words
    assert "By fine-tuning, rn8 on digits" in page.words


def test_results_are_read_from_wherever_they_are(results, tmp_path_factory, capsys):
    """Parts run with any --out, one of them twice; hidden folders and unrelated files are not."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (results / "layer_outputs").rename(elsewhere / "any name")
    (results / "fine_tuning").rename(elsewhere / ".hidden")
    write_weights(elsewhere, "rn8", 4, [(30.0, 5.0)])
    (elsewhere / "weights_sqnr").rename(elsewhere / "again")
    (elsewhere / "unrelated_4_bits_x.json").write_text("nothing")
    words = [str(results), str(elsewhere), "--model", "rn8", "--out", str(elsewhere)]
    assert report.main(words) == 0
    head, _, four, _ = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    heads = head.strip("| ").split(" | ")[2:]
    gaps = dict(zip(heads, four.strip("| ").split(" | ")[2:], strict=True))
    second = max(elsewhere / "again", results / "weights_sqnr")
    assert list(gaps) == ["Weights: rn8", f"Weights: rn8, {second}", "Layer outputs: rn8 on digits"]
    assert sorted(gaps.values()) == ["+12.00 dB", "+25.00 dB", "+5.00 dB"]
    assert (elsewhere / "report.html").exists()


def test_a_folder_that_is_missing(tmp_path, capsys):
    assert report.main([str(tmp_path), str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: no such folder\n"


@pytest.mark.parametrize("words", [[], ["--model", "rn56"]])
def test_nothing_to_report(words, tmp_path, capsys):
    if words:
        write_weights(tmp_path, "rn8", 4, [(20.0, 5.0)])
    assert report.main([str(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert "no results of the study" in error and error.count("\n") == 1
    assert not list(tmp_path.glob("report.*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights_sqnr/rn8_4_bits_mse.json", "{", "not a complete JSON file"),
        ("weights_sqnr/rn8_4_bits_mse.json", '{"conv1": {}}', "conv1 has no pruning_sqnr"),
        (
            "layer_outputs/rn8_conv1_4_bits_pruning.json",
            '{"settings": {}, "figures": {}}',
            "part layer outputs is not as its command",
        ),
        ("fine_tuning/table_rn8_digits.json", "{}", "part fine-tuning is not as its command"),
        ("expected_sqnr/expected_sqnr.json", "{}", "not a result of this study"),
    ],
)
def test_broken_results_are_one_line(name, content, message, tmp_path, capsys):
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text(content)
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
