"""How many tokens a server takes a text for, before it tokenises it."""

from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer

from batchclf.serve.classifier import estimate_tokens

SENTENCES = {
    "Latin": "The government said on Tuesday that the budget would be balanced by next year.",
    "Latin with accents": "Le gouvernement a déclaré que le budget serait équilibré l'an prochain.",
    "Cyrillic": "Правительство заявило во вторник, что бюджет будет сбалансирован.",
    "Arabic": "قالت الحكومة يوم الثلاثاء إن الميزانية ستكون متوازنة العام المقبل.",
    "Devanagari": "सरकार ने मंगलवार को कहा कि अगले साल बजट संतुलित होगा।",
    "Hangul": "정부는 수출 감소에도 불구하고 내년에는 예산이 균형을 이룰 것이라고 밝혔다.",
    "Han": "政府周二表示尽管出口下降明年预算仍将保持平衡。",
    "Kana": "政府は火曜日、来年には予算が均衡すると述べた。",
    "Thai": "รัฐบาลกล่าวเมื่อวันอังคารว่างบประมาณจะสมดุลในปีหน้า",
    "emoji": "😀🎉🔥🚀👍🌍📈🏆🎬",
}


@pytest.fixture(scope="module")
def vocabulary(shared: Path) -> ByteLevelBPETokenizer:
    folder = shared / "gpt2-tokenizer"
    return ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


@pytest.mark.parametrize("script", SENTENCES)
def test_about_as_many_tokens_are_expected_as_the_vocabulary_of_gpt2_has(
    script: str, vocabulary: ByteLevelBPETokenizer
) -> None:
    text = SENTENCES[script]
    num_tokens = len(vocabulary.encode(text).ids)
    assert 0.6 * num_tokens <= estimate_tokens(text) <= 1.4 * num_tokens


def test_a_text_without_characters_has_one_token() -> None:
    assert estimate_tokens("") == 1


def test_the_beginning_of_a_text_stands_for_all_of_it() -> None:
    assert estimate_tokens("новости " * 10_000) == pytest.approx(
        100 * estimate_tokens("новости " * 100), rel=0.02
    )
