"""The whole demo through the command line alone, each party in a folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from myelin import hospitals, recipe
from myelin.cpu import Cpu

MYELIN = str(Path(sys.executable).parent / "myelin")
MODEL = """
from myelin import nn
net = nn.Sequential(nn.Linear(30, 1))
other = nn.Sequential(nn.Linear(30, 2), nn.Tanh(), nn.Linear(2, 1))
"""
BUILD = ("--shape", "30", "--loss", "binary-cross-entropy", "--records", "480", "--test", "160")
PRIVACY = ("--epsilon", "2", "--steps", "200", "--sample-rate", "0.5", "--max-grad-norm", "0.1")
SENDERS = {"north": "records", "river": "records", "hill": "records", "registry": "test"}


def myelin(*arguments: object, code: int = 0) -> dict[str, object]:
    """Runs a verb with --json; checks the exit code and that stdout is one JSON object."""
    verb, *rest = map(str, arguments)
    done = subprocess.run(
        [MYELIN, verb, *rest, "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stderr
    if code:
        assert done.stdout == ""
        return {"stderr": done.stderr}
    return dict(json.loads(done.stdout))


@dataclass(frozen=True, kw_only=True)
class Town:
    """Where everyone's folder is, after the job ran to its end."""

    root: Path
    exchange: Path
    policy: Path
    granted: dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    root = tmp_path_factory.mktemp("town")
    exchange, world = root / "exchange", root / "host" / "world"
    for name in (*SENDERS, "university"):
        myelin("keygen", name, "--out", root / name)
    (root / "model.py").write_text(MODEL)
    optimizer = ("--optimizer", "sgd,lr=1.0,momentum=0.9")
    myelin("build", f"{root}/model.py:net", *BUILD, *optimizer, "--out", root / "build")
    data, test = hospitals.load()
    for name, records in zip(SENDERS, [*data.values(), test], strict=True):
        table = np.hstack([records.features, records.labels])
        np.savetxt(root / name / "data.csv", table, delimiter=",", fmt="%.9g")
        sealed = root / name / "data.sealed"
        myelin(
            *("seal", root / name / "data.csv", "--capacity", 160),
            *("--labels", "real", "--out", sealed),
            *(("--budget", 2) if SENDERS[name] == "records" else ()),
        )
    owners = [f"--records={root}/{name}/{name}.pub:160" for name in ("north", "river", "hill")]
    myelin(
        *("job", root / "build", "--exchange", exchange, *owners, *PRIVACY),
        *("--test", f"{root}/registry/registry.pub:160"),
        *("--weights", root / "university" / "university.pub"),
    )
    everyone = (*SENDERS, "university")
    pins = [f"--party={root}/{name}/{name}.pub" for name in everyone]
    measurement = myelin("inspect", root / "build" / "image.elf")["measurement"]
    for name in everyone:
        # One rebuilds the image; the others have the measurement from somebody they trust.
        how = ("--rebuild",) if name == "registry" else ("--measurement", measurement)
        myelin("approve", exchange, "--key", root / name / f"{name}.key", *how, *pins)
    command = [MYELIN, "run", str(exchange), "--simulator", str(world), "--wait", "120", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as host:
        # The senders' policy names the root that the host makes when it starts.
        while host.poll() is None and not (world / "root.pem").exists():
            time.sleep(0.05)
        try:
            policy = root / "policy.toml"
            policy.write_text(
                f'type = "myelin/policy/1"\ndanger_simulator_root = "{world}/root.pem"\n'
            )
            granted = {}
            for name, slot in SENDERS.items():
                granted[name] = myelin(
                    *("grant", exchange, "--key", root / name / f"{name}.key", "--slot", slot),
                    *("--sealed", root / name / "data.sealed", "--policy", policy, "--wait", 60),
                )
            stdout, stderr = host.communicate(timeout=120)
            assert host.returncode == 0, stderr
            assert "simulated" in stderr
            assert json.loads(stdout)["simulated"] is True
            yield Town(root=root, exchange=exchange, policy=policy, granted=granted)
        finally:
            host.kill()


def verified(town: Town, *arguments: object, code: int = 0) -> dict[str, object]:
    receipt, job = town.exchange / "receipt.cbor", town.exchange / "job.cbor"
    given = arguments or ("--job", job)
    return myelin("verify", receipt, "--policy", town.policy, *given, code=code)


def test_every_sender_appraised_the_job_s_measurement(town: Town) -> None:
    image = myelin("inspect", town.exchange / "image.elf")
    for answer in town.granted.values():
        assert answer["measurement"] == image["measurement"]
        assert answer["simulated"] is True


def test_the_receipt_verifies_and_states_privacy_and_score(town: Town) -> None:
    answer = verified(town)
    assert 0 < float(str(answer["epsilon"])) <= 2
    assert answer["steps"] == 200
    assert answer["neighboring_relation"] == "add-or-remove-one"
    assert answer["simulated"] is True
    assert float(str(answer["score"])) >= 0.92


def test_the_receiver_opens_weights_that_predict_what_the_receipt_says(town: Town) -> None:
    out = town.root / "weights.safetensors"
    key = town.root / "university" / "university.key"
    myelin("fetch", town.exchange, "--key", key, "--policy", town.policy, "--out", out)
    weight, bias = safetensors.numpy.load_file(out).values()
    if weight.ndim == 1:
        weight, bias = bias, weight
    _, test = hospitals.load()
    outputs = test.features.astype(np.float64) @ weight.T.astype(np.float64) + bias
    accuracy = np.mean((outputs > 0) == (test.labels > 0.5))
    receipt = verified(town)
    assert abs(accuracy - float(str(receipt["score"]))) < 1 / len(test.labels) + 1e-9


def test_the_plan_says_what_was_chosen_for_each_layer(town: Town) -> None:
    model = town.exchange / "model.json"
    done = subprocess.run(
        [MYELIN, "inspect", model, "--plan"], capture_output=True, text=True, check=True
    )
    heading, *rows, total = done.stdout.splitlines()
    assert heading.split() == [
        *("layer", "kernel", "norm", "algorithm", "threads", "GFLOP", "predicted", "ms", "MiB")
    ]
    assert any("linear" in row and "product" in row for row in rows)
    decisions = recipe.plan(model.read_bytes()).decisions
    assert total.split()[:3] == ["total", str(len(decisions)), "calls"]
    assert len(rows) == len(decisions)
    assert float(total.split()[-1]) == pytest.approx(sum(d.ms for d in decisions), abs=5e-4)


def test_a_rebuild_measures_the_same(town: Town) -> None:
    answer = myelin("rebuild", town.exchange / "job.cbor", "--model", town.exchange / "model.json")
    assert answer["measurement"] == myelin("inspect", town.exchange / "image.elf")["measurement"]


def test_a_rebuild_of_another_model_says_what_differs(town: Town) -> None:
    other = town.root / "other"
    myelin("build", f"{town.root}/model.py:other", *BUILD, "--out", other)
    answer = myelin(
        *("rebuild", town.exchange / "job.cbor", "--model", other / "model.json"),
        *("--image", town.exchange / "image.elf"),
        code=6,
    )
    assert "version of kernels" in str(answer["stderr"])
    assert "description field parameters" in str(answer["stderr"])


def test_native_says_what_it_chose(town: Town) -> None:
    answer = myelin(
        *("build", f"{town.root}/model.py:net", *BUILD, "--cpu", "native"),
        *("--out", town.root / "native"),
    )
    assert answer["cpu"] == Cpu.native("float32").level
    assert answer["native"] == Cpu.native_reasons("float32")
    assert str(answer["cpu"]) in str(answer["native"])


def test_a_changed_receipt_is_invalid(town: Town) -> None:
    content = bytearray((town.exchange / "receipt.cbor").read_bytes())
    content[-200] ^= 1
    changed = town.root / "changed.cbor"
    changed.write_bytes(content)
    answer = myelin(
        *("verify", changed, "--policy", town.policy),
        *("--endorsements", town.exchange / "endorsements.json"),
        *("--job", town.exchange / "job.cbor"),
        code=4,
    )
    assert "receipt invalid" in str(answer["stderr"])


def test_a_production_policy_refuses_the_simulator(town: Town) -> None:
    policy = town.root / "production.toml"
    policy.write_text('type = "myelin/policy/1"\n')
    receipt, job = town.exchange / "receipt.cbor", town.exchange / "job.cbor"
    answer = myelin("verify", receipt, "--policy", policy, "--job", job, code=4)
    assert "root" in str(answer["stderr"])


def test_a_receipt_is_judged_only_against_what_the_verifier_knows(town: Town) -> None:
    policy = ("--endorsements", town.exchange / "endorsements.json")
    answer = verified(town, *policy, code=4)
    assert "names neither the job nor a measurement" in str(answer["stderr"])
    assert "another job" in str(verified(town, "--job", "ab" * 32, code=4)["stderr"])
    digest = str(verified(town)["job"])
    assert verified(town, "--job", digest)["job"] == digest
    assert set(verified(town)["parties"]) == {*SENDERS, "university"}  # type: ignore[call-overload]


def test_an_expired_receipt_can_be_judged_as_at_its_time(town: Town) -> None:
    job = ("--job", town.exchange / "job.cbor")
    assert "xpired" in str(verified(town, *job, "--at", "2126-01-01T00:00Z", code=4)["stderr"])
    now = datetime.now(UTC).isoformat(timespec="minutes")
    assert verified(town, *job, "--at", now)["simulated"] is True


def test_a_job_that_the_host_swaps_after_the_approval_gets_no_key(
    town: Town, tmp_path: Path
) -> None:
    """The host writes a job of its own, with its own receiver, where the approved one lay."""
    keys = tmp_path / "mallory"
    myelin("keygen", "mallory", "--out", keys)
    owners = [f"--records={town.root}/{n}/{n}.pub:160" for n in ("north", "river", "hill")]
    swapped = tmp_path / "exchange"
    myelin(
        *("job", town.root / "build", "--exchange", swapped, *owners, *PRIVACY),
        *("--weights", keys / "mallory.pub"),
    )
    north = town.root / "north"
    answer = myelin(
        *("grant", swapped, "--key", north / "north.key", "--sealed", north / "data.sealed"),
        *("--policy", town.policy, "--wait", 1),
        code=1,
    )
    assert "approval" in str(answer["stderr"])
    assert not (swapped / "grants").exists()


@pytest.mark.parametrize(
    ("how", "code", "word"),
    [
        ((), 2, "say how you know the image"),
        (("--measurement", "00" * 32), 6, "you know 00"),
        (("--danger-unchecked-image", "--party", "hill"), 2, "not among the public files"),
    ],
)
def test_nobody_approves_blindly(town: Town, how: tuple[str, ...], code: int, word: str) -> None:
    given = [f"{town.root}/{one}/{one}.pub" if one == "hill" else one for one in how]
    key = town.root / "north" / "north.key"
    answer = myelin("approve", town.exchange, "--key", key, *given, code=code)
    assert word in str(answer["stderr"])


def test_training_records_without_a_budget_are_not_granted(town: Town, tmp_path: Path) -> None:
    sealed = tmp_path / "data.sealed"
    table = town.root / "north" / "data.csv"
    myelin("seal", table, "--capacity", 160, "--labels", "real", "--out", sealed)
    answer = myelin(
        *("grant", town.exchange, "--key", town.root / "north" / "north.key"),
        *("--sealed", sealed, "--policy", town.policy),
        code=2,
    )
    assert "--budget" in str(answer["stderr"])


def test_a_spent_budget_ends_with_5(town: Town) -> None:
    """The same job again would spend epsilon 2 twice; the host still answers with evidence."""
    world = town.root / "host" / "world"
    host = subprocess.Popen(
        [MYELIN, "run", str(town.exchange), "--simulator", str(world), "--wait", "60"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        north = town.root / "north"
        answer = myelin(
            *("grant", town.exchange, "--key", north / "north.key", "--policy", town.policy),
            *("--sealed", north / "data.sealed", "--wait", 60),
            code=5,
        )
    finally:
        host.kill()
        host.wait()
    assert "budget exceeded" in str(answer["stderr"])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("build", "model.txt", *BUILD, "--out", "x"), "an .onnx file, or FILE.py:NAME"),
        (("seal", "nothing.txt", "--capacity", "1", "--out", "x"), ".npz or .csv"),
        (("approve", "."), "--key"),
    ],
)
def test_usage_errors_end_with_2(arguments: tuple[str, ...], word: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [MYELIN, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert word in done.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (
            ("seal", "d.csv", "--capacity", "9", "--out", "x", "--budget", "nan"),
            "budget of epsilon",
        ),
        (("seal", "d.csv", "--capacity", "0", "--out", "x"), "capacity is 0"),
        (("seal", "d.csv", "--capacity", "1", "--out", "x"), "do not fit the capacity 1"),
        (("seal", "junk.npz", "--capacity", "9", "--out", "x"), "no .npz file"),
        (("budget", "--records", "9", *PRIVACY[:2], "--steps", "0", *PRIVACY[4:]), "steps is 0"),
        (("budget", "--records", "9", *PRIVACY[:4], "--sample-rate", "1.5"), "sample_rate is 1.5"),
        (("demo", "--backend", "foo"), "choose one of process, kvm"),
        (("inspect", "d.csv.txt"), "check the path"),
    ],
)
def test_wrong_numbers_and_files_are_named(
    arguments: tuple[str, ...], word: str, tmp_path: Path
) -> None:
    (tmp_path / "d.csv").write_text("1,0\n2,1\n")
    (tmp_path / "junk.npz").write_bytes(b"PK\x03\x04 junk")
    done = subprocess.run(
        [MYELIN, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode in (1, 2), done.stderr
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_job_larger_than_its_image_is_refused(town: Town, tmp_path: Path) -> None:
    answer = myelin(
        *("job", town.root / "build", "--exchange", tmp_path / "exchange", *PRIVACY),
        *("--records", f"{town.root}/north/north.pub:481"),
        *("--weights", town.root / "university" / "university.pub"),
        code=2,
    )
    assert "the image has room for 480 records" in str(answer["stderr"])


def test_who_receives_nothing_fetches_nothing(town: Town, tmp_path: Path) -> None:
    key = town.root / "north" / "north.key"
    out = tmp_path / "weights.safetensors"
    answer = myelin(
        *("fetch", town.exchange, "--key", key, "--policy", town.policy, "--out", out), code=2
    )
    assert "receives no weights" in str(answer["stderr"])


def test_budget_answers_with_the_noise_that_keeps_epsilon() -> None:
    answer = myelin("budget", "--records", 480, *PRIVACY)
    assert 0 < float(str(answer["epsilon"])) <= 2
    assert float(str(answer["noise_multiplier"])) > 0


def test_every_verb_has_an_example_in_its_help() -> None:
    verbs = "keygen budget build inspect job approve seal grant run fetch verify rebuild demo"
    for verb in verbs.split():
        done = subprocess.run([MYELIN, verb, "--help"], capture_output=True, text=True, check=True)
        assert f"Example: myelin {verb}" in done.stdout
