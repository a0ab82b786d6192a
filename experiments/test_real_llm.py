"""Tests of real_llm.py's own arithmetic: python -m pytest test_real_llm.py"""
import math

import pytest

import real_llm


def make_line(arm: str, seed: int, end: float) -> dict:
    """A run of two evaluations; its accuracy rises from .1 at 0 tokens to `end` at 1,000."""
    trained = {
        "step": 10,
        "tokens_sampled": 1000,
        "time_sample": 3.0,
        "time_score": 0.5,
        "time_update": 1.5,
        "completions/mean_length": 20.0,
        "eval/accuracy": end,
        "eval/greedy_accuracy": end,
    }
    before = {"step": 0, "eval/accuracy": 0.1, "eval/greedy_accuracy": 0.2}
    settings = {"eval_questions": 100}
    return {
        "arm": arm, "lr": 1e-5, "seed": seed, "settings": settings, "metrics": [before, trained],
    }


def test_no_training_question_equals_a_dev_question_up_to_its_numbers():
    rows = [{"question": f"Ann has {k % 7} nuts of kind {'ab'[k % 2]}", "answer": str(k)}
            for k in range(600)]
    rows.append({"question": "half", "answer": "0.5"})
    for letter in "cdefgh":
        rows += [{"question": letter * k, "answer": "1"} for k in range(1, 200)]
    training, dev = real_llm.split_questions(rows)
    assert len(dev) == 256
    seen = {real_llm.without_numbers(row["question"]) for row in dev}
    kept = {real_llm.without_numbers(row["question"]) for row in training}
    assert not seen & kept
    everything = {real_llm.without_numbers(row["question"]) for row in rows}
    assert seen | kept == everything - {"half"}  # the decimal answer is left out, nothing else
    assert (training, dev) == real_llm.split_questions(rows)


def test_interval_is_students_t():
    # Mean 3, standard deviation sqrt(2.5), 4 degrees of freedom: 2.776 * sqrt(2.5 / 5) = 1.963.
    mean, half = real_llm.interval([1, 2, 3, 4, 5])
    assert mean == 3
    assert half == pytest.approx(1.963, abs=5e-4)
    assert math.isnan(real_llm.interval([0.4])[1])


def test_curve_adds_up_training_time_and_reads_between_evaluations():
    curve = real_llm.make_curve(make_line("grpo", 0, 0.5))
    assert curve.tokens == [0, 1000]
    assert curve.seconds == [0.0, 5.0]
    assert real_llm.read_at(curve.tokens, curve.accuracy, 250) == pytest.approx(0.2)
    assert real_llm.read_at(curve.tokens, curve.accuracy, 1000) == 0.5


def test_gain_counts_binomial_standard_errors():
    # Errors .03 = sqrt(.1 * .9 / 100) and .05 = sqrt(.5 * .5 / 100): .4 / sqrt(.0034) = 6.860.
    curve = real_llm.make_curve(make_line("grpo", 0, 0.5))
    assert real_llm.gain_in_errors(curve) == pytest.approx(6.860, abs=5e-4)


def test_gain_takes_the_logged_standard_errors_where_there_are_any():
    line = make_line("grpo", 0, 0.5)
    line["metrics"][0]["eval/standard_error"] = 0.03
    line["metrics"][1]["eval/standard_error"] = 0.04
    assert real_llm.gain_in_errors(real_llm.make_curve(line)) == pytest.approx(0.4 / 0.05)


def test_differences_pair_the_seeds_that_both_have():
    lines = [make_line("grpo", 0, 0.3), make_line("grpo", 1, 0.5)]
    lines += [make_line("treerpo", 1, 0.6), make_line("treerpo", 2, 0.9)]
    groups = real_llm.group_curves(lines)
    gaps = real_llm.differences(groups["treerpo, lr 1e-05"], groups["grpo, lr 1e-05"], 1000)
    assert gaps == [pytest.approx(0.1)]
    assert "| +10.0 |" in real_llm.make_table(lines)


def test_every_arm_is_accepted_by_treerpo(monkeypatch):
    monkeypatch.syspath_prepend(str(real_llm.ROOT))
    import treerpo
    for flags in real_llm.ARMS.values():
        settings = treerpo.parse_settings(["--model", "m", "--data", "d", *flags.split()])
        assert sum(treerpo.per_level(settings.step_len, settings.branching)) == 32


def test_a_finished_run_is_known_by_its_raw_line(tmp_path):
    args = real_llm.parse_args(["--folder", str(tmp_path), "--results", str(tmp_path / "r.jsonl")])
    run = real_llm.list_runs(args)[0]
    assert not real_llm.is_finished(run, args)
    real_llm.write_jsonl(args.results, [{"run": run.name, "steps": args.steps - 1}])
    assert not real_llm.is_finished(run, args)
    real_llm.write_jsonl(args.results, [{"run": run.name, "steps": args.steps}])
    assert real_llm.is_finished(run, args)
