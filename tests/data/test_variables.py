import random
import re

import pytest

from rtpurbo.data.needles import is_correct
from rtpurbo.data.variables import draw_chains, make_variable_example, scatter
from rtpurbo.data.wordings import ChainWording
from rtpurbo.errors import RTPurboError
from tests.data.test_needles import corpus
from tests.tiny_tokenizer import tiny_tokenizer

ASSIGNMENT = re.compile(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})\.")


@pytest.mark.parametrize(("num_chains", "num_hops"), [(1, 4), (3, 2), (2, 0)])
@pytest.mark.parametrize("has_template", [True, False])
def test_following_the_assignments_gives_the_answer(num_chains, num_hops, has_template):
    tokenizer = tiny_tokenizer() if has_template else tiny_tokenizer(chat_template=None)
    example = make_variable_example(
        tokenizer, corpus(), 2000, random.Random(3), num_hops=num_hops, num_chains=num_chains
    )
    assert 1980 <= len(example.prompt_ids) + len(example.answer_ids) <= 2000
    text = tokenizer.decode(example.prompt_ids)
    held = {}
    for name, source in ASSIGNMENT.findall(text):
        held[name] = held.get(source, source)
    assert len(held) == num_chains * (num_hops + 1)
    [asked] = re.findall(r"assigned the value (\d+) in", text)
    assert [name for name, value in held.items() if value == asked] == example.answers
    answer = tokenizer.decode(example.answer_ids)
    assert answer == f" {' '.join(example.answers)}"
    assert is_correct(example, f"They are: {', '.join(reversed(example.answers))}.")
    assert not is_correct(example, f"{' '.join(example.answers[1:])} X{example.answers[0]}")
    assert ("<|im_start|>assistant\n" in text) == has_template


def test_splits_share_no_name_and_chains_keep_their_order():
    train, test = (draw_chains(random.Random(0), 40, 4, split) for split in ("train", "test"))
    names = [{name for chain in chains for name in chain.names} for chains in (train, test)]
    assert len(names[0]) == len(names[1]) == 200
    assert not names[0] & names[1]
    wording = ChainWording.draw(random.Random(0), "train")
    sentences = [sentence for _, sentence in scatter(random.Random(0), train, wording)]
    for chain in train:
        places = [sentences.index(sentence) for sentence in chain.assignments(wording)]
        assert places == sorted(places)


def test_training_has_names_of_many_styles_and_none_contains_another():
    shapes = set()
    for seed in range(60):
        names = [
            name
            for chain in draw_chains(random.Random(seed), 4, 4, "train")
            for name in chain.names
        ]
        assert not any(a in b for a in names for b in names if a != b)
        assert len(set(names)) == len(names)
        shapes.add(re.sub(r"[a-z]+", "a", re.sub(r"[A-Z]+", "A", re.sub(r"\d+", "0", names[0]))))
    assert shapes == {"A", "a", "a_0", "a0", "aAa"}


def test_no_chain_is_refused():
    with pytest.raises(RTPurboError, match="at least one chain"):
        draw_chains(random.Random(0), 0, 4, "test")
