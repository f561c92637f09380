"""Reading a step's result."""

import torch

from hybridgen.core import TokenLogprob
from hybridgen.execution import LaunchedStep
from hybridgen.sampling import SampleOutput


def test_tokens_alone() -> None:
    assert LaunchedStep(SampleOutput(torch.tensor([3, -1]))).read() == ([3, -1], None)


def test_log_probabilities_of_the_chosen_tokens() -> None:
    step = LaunchedStep(SampleOutput(torch.tensor([3, 4]), torch.tensor([-1.0, -2.0])))
    assert step.read().logprobs == [TokenLogprob(3, -1.0), TokenLogprob(4, -2.0)]


def test_log_probabilities_of_candidates() -> None:
    step = LaunchedStep(
        SampleOutput(torch.tensor([3]), torch.tensor([-1.0]), torch.tensor([[3, 9]]), torch.tensor([[-1.0, -1.5]]))
    )
    assert step.read().logprobs == [TokenLogprob(3, -1.0, ((3, -1.0), (9, -1.5)))]
