"""The table of model families and features in docs/models.md, made from the tests' results: `make features`.

A test with `@pytest.mark.feature("beams")` covers the feature for the family of its parameter `family`; a test
without this parameter names the families: `@pytest.mark.feature("beams", "qwen2")`.
"""

import sys
from collections import defaultdict
from xml.etree import ElementTree

from bench.generated import README, updated

PAGE = README.parent / "docs" / "models.md"
BEGIN, END = "<!-- made by make features -->", "<!-- end -->"
TITLES = {
    "qwen2": "Qwen2 with `inputs_embeds`", "qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL",
    "qwen3_5": "Qwen3.5", "llava_onevision": "LLaVA-OneVision", "llava_next_video": "LLaVA-NeXT-Video",
    "qwen3_vl_moe": "Qwen3-VL, mixture of experts", "qwen3_5_moe": "Qwen3.5, mixture of experts",
    "internvl": "InternVL", "video_llama_3": "VideoLLaMA3", "minicpmv4_6": "MiniCPM-V 4.6",
    "minicpmv4_7": "MiniCPM-V 4.7", "minicpm_ocr": "MiniCPM-OCR", "qwen2_5_omni_thinker": "Qwen2.5-Omni, thinker",
    "qwen3_omni_moe_thinker": "Qwen3-Omni, thinker", "video_llava": "Video-LLaVA", "smolvlm": "SmolVLM2",
    "glm4v_moe": "GLM-4.5V", "kimi_k25": "Kimi K2.5", "cosmos3_edge": "Cosmos 3 Edge", "cosmos3_omni": "Cosmos 3 Omni",
}  # fmt: skip


def spoken_for(item):
    """The (family, feature) pairs that a test covers."""
    parameter = getattr(item, "callspec", None) and item.callspec.params.get("family")
    pairs = []
    for marker in item.iter_markers("feature"):
        feature, *families = marker.args
        if parameter is not None:
            families = [getattr(parameter, "name", None) or getattr(parameter, "__name__", None) or str(parameter)]
        pairs += [(family, feature) for family in families]
    return pairs


def outcomes(report):
    """{(family, feature): the outcomes of its tests} from a JUnit report."""
    found = defaultdict(set)
    for case in ElementTree.parse(report).iter("testcase"):
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"
        for entry in case.iter("property"):
            if entry.get("name") == "feature":
                family, feature = entry.get("value").split(": ", 1)
                found[family, feature].add(outcome)
    return found


def cell(results):
    """What the tests of one family and feature say together."""
    if "failed" in results:
        return "**no**"
    return "yes" if "passed" in results else "-" if results else ""


def table(found):
    """Markdown: one row per family, one column per feature, in the order of the tests."""
    families = [family for family in TITLES if any(family == pair[0] for pair in found)]
    features = list(dict.fromkeys(feature for _, feature in found))
    lines = ["| | " + " | ".join(features) + " |", "|---|" + "---|" * len(features)]
    for family in families:
        lines.append(f"| {TITLES[family]} | " + " | ".join(cell(found[family, feature]) for feature in features) + " |")
    return "\n".join(lines)


def pairs_in(text):
    """The (family, feature) pairs that the table in `text` has an entry for."""
    rows = [
        [part.strip() for part in line.strip("|").split("|")]
        for line in between(text).splitlines()
        if line.startswith("|") and not line.startswith("|---")
    ]
    names = {title: family for family, title in TITLES.items()}
    return {
        (names[row[0]], feature)
        for row in rows[1:]
        for feature, entry in zip(rows[0][1:], row[1:], strict=True)
        if entry
    }


def between(text):
    """What stands between the markers."""
    return text.split(BEGIN)[1].split(END)[0]


def main(report):
    import torch
    import transformers

    found = outcomes(report)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    legend = f"yes: every test passes ({versions}); -: transformers itself does not do it; blank: not tested."
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(updated(text, f"{table(found)}\n\n{legend}", BEGIN, END), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
