"""The default model: every row of a batch of the base and eight adapters equals PEFT alone."""

from __future__ import annotations

from pathlib import Path

from tests.oracle import adapters, peft_oracle, tiny
from tests.support.engines import Driver, LogitsRecorder, greedy_request, new_engine, put_blob

NUM_TOKENS = 4
# (rank, prompt length): ranks of every size, long prompts beside single tokens.
USERS = ((1, 9), (3, 30), (8, 1), (16, 17), (64, 5), (8, 24), (4, 2), (2, 12))


def test_smollm2_with_eight_adapters_in_one_batch_equals_peft(smollm2_dir: Path, tmp_path: Path):
    engine = new_engine(
        smollm2_dir,
        tmp_path / "blobs",
        kv_cache_bytes=256 << 20,
        max_adapter_bytes=256 << 20,
        max_num_batched_tokens=512,
    )
    recorder, driver = LogitsRecorder(engine), Driver(engine)
    requests, directories = [], []
    for number, (rank, length) in enumerate(USERS):
        directory = adapters.make_lora(smollm2_dir, tmp_path / str(number), rank, seed=number)
        identity = put_blob(tmp_path / "blobs", directory, f"a{number}")
        driver.load(identity)
        ids = [tiny.START_ID, *(7 * i + 100 * number for i in range(1, length))]
        requests.append(
            greedy_request(f"r{number}", ids, identity, NUM_TOKENS, num_prompt_logprobs=0)
        )
        directories.append(directory)
    base_ids = [1, 520, 9531, 253, 260, 4575, 282, 4649, 47]
    requests.append(greedy_request("base", base_ids, None, NUM_TOKENS, num_prompt_logprobs=0))
    transcripts = driver.run(*requests)
    assert max(recorder.adapters_per_step) == len(USERS), "they were not in one batch"
    for request, directory in zip(requests, [*directories, None], strict=True):
        tokens = transcripts[request.id].tokens
        seen = [*request.prompt_ids, *tokens[:-1]]
        oracle = peft_oracle.logits(smollm2_dir, directory, seen)
        peft_oracle.assert_matches(recorder.of(request.id), oracle)
        expected, margins = peft_oracle.greedy(
            smollm2_dir, directory, request.prompt_ids, NUM_TOKENS
        )
        if margins[0] >= peft_oracle.MARGIN_FLOOR:
            peft_oracle.assert_greedy_equal(tokens, expected, margins)
