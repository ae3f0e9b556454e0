import json
import subprocess
import sys

import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.policies import POLICIES
from rtpurbo.evaluation.request import POLICY_NAMES, Request


def test_names_of_policies_are_those_of_the_policies():
    assert list(POLICY_NAMES) == list(POLICIES)


def test_requests_are_checked_without_torch():
    program = "import sys, rtpurbo.evaluation.request, rtpurbo.cli.evaluate\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_data_goes_to_the_suite_or_to_the_task_of_lm_eval(tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    file.write_text(json.dumps({"question": "1?", "answer": "#### 1"}))
    files = {"gsm8k": file, "aime24": "aime24.jsonl"}
    both = Request.of(["gsm8k", "lm-eval:aime24"], [512], ["full"], task_data=files)
    assert list(both.harness_data) == ["aime24"]
    assert list(both.question_data) == ["gsm8k"]
    theirs = Request.of(["lm-eval:gsm8k,aime24"], [512], ["full"], task_data=files)
    assert list(theirs.harness_data) == ["gsm8k", "aime24"]
    with pytest.raises(RTPurboError, match="the task 'aime24' of lm-eval, which is not asked for"):
        Request.of(["gsm8k"], [512], ["full"], task_data=files)


def test_lengths_are_compared_with_the_context(tiny_artifact, tiny_base, tmp_path):
    request = Request.of(["needle"], [1025], ["full"])
    with pytest.raises(RTPurboError, match="1,025 tokens do not fit the model's context of 1,024"):
        request.check_lengths(tiny_artifact)
    with pytest.raises(RTPurboError, match="1,025 tokens do not fit"):
        request.check_lengths(tiny_artifact, str(tiny_base))
    Request.of(["needle"], [1024], ["full"]).check_lengths(tiny_artifact)
    # What is not here is found out by loading.
    request.check_lengths(tiny_artifact, "hub/name")
    with pytest.raises(RTPurboError, match="context of 8,192"):
        Request.of(["needle"], [9000], ["full"]).check_lengths(
            tiny_artifact, "wheel:smollm2-135m-instruct"
        )
    request.check_lengths(tmp_path)
