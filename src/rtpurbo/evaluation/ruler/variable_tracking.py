"""Variable tracking: the variables of a value, along chains of assignments in noise."""

from __future__ import annotations

from rtpurbo.data.prompts import hide_among_lines
from rtpurbo.data.variables import draw_chains, scatter
from rtpurbo.data.wordings import ChainWording
from rtpurbo.evaluation.ruler.draft import Draft, Request
from rtpurbo.evaluation.ruler.materials import noise_lines

TOKENS_TO_GENERATE = 30
NUM_CHAINS, NUM_HOPS = 1, 4

# The worked example has about 500 tokens.
EXAMPLE_SENTENCES = 75
SMALLEST = 40


def draft(request: Request) -> Draft:
    """Draws a queried chain, and another one for the worked example before it."""
    rng = request.rng
    wording = ChainWording.draw(rng, "test")
    introduction = wording.introduce(rng)
    *chains, shown = draw_chains(rng, NUM_CHAINS + 1, NUM_HOPS, "test")
    question, solution = (
        wording.ask(rng, chain.value, chain.names) for chain in (chains[0], shown)
    )
    hidden = scatter(rng, chains, wording)
    example = _tracked(introduction, scatter(rng, [shown], wording), EXAMPLE_SENTENCES)
    solved = solution.solved_after(example)
    return Draft(
        text=lambda size: f"{solved}\n\n\n{_tracked(introduction, hidden, size)}",
        question=question.question,
        opening=question.opening,
        answers=chains[0].names,
        smallest=SMALLEST,
    )


def _tracked(introduction: str, hidden: list[tuple[float, str]], num_sentences: int) -> str:
    return f"{introduction}\n\n{hide_among_lines(noise_lines(num_sentences), hidden)}"
