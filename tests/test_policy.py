from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from parties import job, world

from myelin.errors import PolicyInvalid
from myelin.policy import INTEL_ROOT, Policy

TEXT = f"""
type = "myelin/policy/1"
measurements = ["{"ab" * 32}"]
job = "{"cd" * 32}"
tcb_statuses = ["UpToDate", "SWHardeningNeeded"]
advisories = ["INTEL-SA-00615"]
dynamic_platforms = "allow"
smt = "refuse"
grace_days = 30
"""


def test_a_whole_file(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(TEXT)
    assert Policy.load(tmp_path / "policy.toml") == Policy(
        measurements=(bytes.fromhex("ab" * 32),),
        job=bytes.fromhex("cd" * 32),
        tcb_statuses=("UpToDate", "SWHardeningNeeded"),
        advisories=("INTEL-SA-00615",),
        dynamic_platforms="allow",
        smt="refuse",
        grace_days=30,
    )


def test_the_shortest_file_is_strict_and_production() -> None:
    made = Policy.parse('type = "myelin/policy/1"')
    assert made == Policy()
    assert made.root == INTEL_ROOT
    assert made.tcb_statuses == ("UpToDate",)
    assert made.advisories == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "type is not"),
        ('type = "myelin/policy/2"', "type is not"),
        ("type = ", "Invalid value"),
        (TEXT + 'tcb_status = "OutOfDate"', "unknown key 'tcb_status'"),
        (TEXT + "[tcb]\n", "unknown key 'tcb'"),
        (
            TEXT.replace('["INTEL-SA-00615"]', '"INTEL-SA-00615"'),
            "advisories is not of the kind list",
        ),
        (TEXT.replace('["INTEL-SA-00615"]', "[615]"), "advisories is not of the kind list"),
        (TEXT.replace('"refuse"', "false"), "smt is not of the kind string"),
        (TEXT.replace('"refuse"', '"no"'), "smt is 'no'"),
        (TEXT.replace("= 30", "= true"), "grace_days is not of the kind integer"),
        (TEXT.replace("= 30", "= -1"), "grace_days is -1"),
        (TEXT.replace("SWHardeningNeeded", "Revoked"), "TCB status 'Revoked'"),
        (TEXT.replace("ab" * 32, "ab" * 31), "not 64 hex digits"),
        (TEXT.replace("cd" * 32, "zz" * 32), "not 64 hex digits"),
        (TEXT + 'danger_simulator_root = "nowhere.pem"', "No such file"),
        (TEXT + f'danger_simulator_root = "{INTEL_ROOT}"', "is Intel's"),
    ],
)
def test_refuses(text: str, message: str) -> None:
    with pytest.raises(PolicyInvalid, match=message):
        Policy.parse(text)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    with pytest.raises(PolicyInvalid, match=r"policy\.toml"):
        Policy.load(path)
    path.write_text("nonsense = 1")
    with pytest.raises(PolicyInvalid, match=r"policy\.toml: unknown key"):
        Policy.load(path)


def test_simulator_root_by_path_and_by_digest(tmp_path: Path) -> None:
    pem = world().certificates["root"].public_bytes(Encoding.PEM)
    (tmp_path / "root.pem").write_bytes(pem)
    (tmp_path / "policy.toml").write_text(
        'type = "myelin/policy/1"\ndanger_simulator_root = "root.pem"\n'
    )
    by_path = Policy.load(tmp_path / "policy.toml")
    by_digest = Policy.parse(
        f'type = "myelin/policy/1"\ndanger_simulator_root = "{world().root.upper()}"'
    )
    assert by_path == by_digest == Policy.dangerous_simulation(tmp_path / "root.pem")
    assert by_path.root == world().root
    (tmp_path / "root.pem").write_text("no certificate")
    with pytest.raises(PolicyInvalid, match="danger_simulator_root"):
        Policy.load(tmp_path / "policy.toml")


def test_for_job() -> None:
    made = job()
    complete = Policy().for_job(made)
    assert complete.measurements == (made.image.measurement,)
    assert complete.job == made.digest
    assert complete.for_job(made) == complete
    with pytest.raises(PolicyInvalid, match="not one of the policy's"):
        Policy(measurements=(bytes(32),)).for_job(made)
    with pytest.raises(PolicyInvalid, match="another job"):
        Policy(job=bytes(32)).for_job(made)
    several = Policy(measurements=(bytes(32), made.image.measurement)).for_job(made)
    assert several.measurements == (made.image.measurement,)
