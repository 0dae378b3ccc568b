"""The command line: each verb is one call of the API.

Data goes to stdout, words for people to stderr; `--json` prints one JSON object on stdout.
Exit codes: 0 ok, 1 failure, 2 usage, 3 evidence rejected, 4 receipt invalid, 5 budget exceeded,
6 image mismatch.
"""

from __future__ import annotations

import importlib.util
import inspect as inspection
import json
import math
import secrets
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from myelin.errors import ImageMismatch, MyelinError, UsageError

app = typer.Typer(
    name="myelin",
    help="Train and serve models inside attested enclaves, on data of owners who do not trust "
    "each other or the machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_people = Console(stderr=True, highlight=False, soft_wrap=True)
# What goes to a file or a program has no width to fold to: more than any table has.
_data_console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 240)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Key = Annotated[Path, typer.Option("--key", help="Your secret key file.")]
ExchangeFolder = Annotated[Path, typer.Argument(help="The exchange folder.")]


def main() -> NoReturn:
    """Runs the command line; every named error ends with its exit code."""
    warnings.simplefilter(
        "ignore"
    )  # Words of the libraries below are not for this command's users.
    try:
        app()
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            _end("interrupted; nothing more was released", 1)
        raise
    except MyelinError as error:
        _end(str(error), error.exit_code)
    except KeyboardInterrupt:
        _end("interrupted; nothing more was released", 1)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _end(f"this needs {error.name}: pip install 'myelin[{extra}]'", 2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _end(f"{where}{error.strerror or error}; check the path and your rights to it", 1)
    except MemoryError:
        _end("memory ran out; use smaller capacities or batches", 1)
    sys.exit(0)


_INTERRUPTED = 130
"""What the command line library exits with after Ctrl-C."""

_EXTRAS = {
    "tvm": "compile",
    "ziglang": "compile",
    "onnx": "onnx",
    "torch": "torch",
    "sklearn": "demo",
}


def _end(words: str, code: int) -> NoReturn:
    _people.print(f"myelin: {words}", markup=False)
    sys.exit(code)


@app.command()
def keygen(
    name: Annotated[str, typer.Argument(help="The party's name, as others will see it.")],
    out: Annotated[Path, typer.Option(help="Where NAME.key and NAME.pub go.")] = Path(),
    as_json: Json = False,
) -> None:
    """Make a party: a secret key file and a public file.

    Example: myelin keygen "Hospital North" --out north
    """
    from myelin.party import Party

    party = Party.generate(name)
    out.mkdir(parents=True, exist_ok=True)
    stem = name.lower().replace(" ", "-").replace("/", "-")
    secret, public = out / f"{stem}.key", out / f"{stem}.pub"
    party.save(secret)
    party.public.save(public)
    _answer(
        {"secret": str(secret), "public": str(public), "fingerprint": party.public.fingerprint},
        as_json,
    )


@app.command()
def budget(
    epsilon: Annotated[float, typer.Option(help="Epsilon to stay within.")],
    records: Annotated[int, typer.Option(help="Capacity of all senders together.")],
    steps: Annotated[int, typer.Option(help="Training steps.")],
    sample_rate: Annotated[float, typer.Option(help="Probability of a record being in a step.")],
    max_grad_norm: Annotated[float, typer.Option(help="Clipping norm of a gradient.")] = 1.0,
    delta: Annotated[float, typer.Option(help="Delta.")] = 1e-5,
    as_json: Json = False,
) -> None:
    """Find the noise that keeps an epsilon.

    Example: myelin budget --epsilon 2 --records 480 --steps 50 --sample-rate 0.5
    """
    from myelin.privacy import NEIGHBORING_RELATION

    made = _privacy(epsilon, delta, max_grad_norm, sample_rate, steps, records)
    _answer(
        {
            "noise_multiplier": made.noise_multiplier,
            "epsilon": made.epsilon,
            "delta": made.delta,
            "neighboring_relation": NEIGHBORING_RELATION,
            "sample_rate": made.sample_rate,
            "steps": made.steps,
            "max_grad_norm": made.max_grad_norm,
            "expected_batch": made.expected_batch,
            "max_batch": made.max_batch,
        },
        as_json,
    )


@app.command("build")
def build_image(
    model: Annotated[
        str, typer.Argument(help="An ONNX file, or FILE.py:NAME of a torch module or myelin layer.")
    ],
    shape: Annotated[str, typer.Option(help="One example's shape, such as 30 or 1,28,28.")],
    loss: Annotated[
        str, typer.Option(help="cross-entropy, binary-cross-entropy or mean-squared-error.")
    ],
    records: Annotated[int, typer.Option(help="Records that fit, over all senders.")],
    out: Annotated[Path, typer.Option(help="The build folder.")],
    optimizer: Annotated[
        str, typer.Option(help="sgd or adam with settings, such as sgd,lr=0.5,momentum=0.9.")
    ] = "sgd,lr=0.1",
    test: Annotated[int, typer.Option(help="Test records that fit.")] = 0,
    features: Annotated[
        str, typer.Option(help="float32, float16, or uint8,UNIT,ZERO: u stands for (u-ZERO)/UNIT.")
    ] = "float32",
    batch: Annotated[int, typer.Option(help="Examples of a physical batch.")] = 64,
    cpu: Annotated[
        str, typer.Option(help="x86-64-v3, x86-64-v4, znver4, sapphirerapids or native.")
    ] = "x86-64-v3",
    precision: Annotated[
        str, typer.Option(help="float32, bf16 or bf16x3: products of bfloat16, sums in float32.")
    ] = "float32",
    threads: Annotated[int, typer.Option(help="Thread slots.")] = 2,
    stored: Annotated[
        int | None, typer.Option(help="MiB for stored per-example gradients.")
    ] = None,
    dump: Annotated[Path | None, typer.Option(help="Write the IR after each pass here.")] = None,
    as_json: Json = False,
) -> None:
    """Compile a model into an enclave image.

    Example: myelin build model.onnx --shape 30 --loss binary-cross-entropy --records 480
    --out build
    """
    from myelin import recipe
    from myelin.cpu import Cpu
    from myelin.kernels.cache import Cache
    from myelin.planner import STORED_BYTES

    products = cast(Any, precision)
    level = Cpu.native(products).level if cpu == "native" else cpu
    with _stages() as stage:
        made = recipe.build(
            _source(model),
            np.zeros((1, *_integers(shape, "shape")), np.float32),
            loss=loss,
            optimizer=_optimizer(optimizer),
            records=records,
            test=test,
            batch=batch,
            features=_features(features),
            stored_bytes=STORED_BYTES if stored is None else stored << 20,
            cpu=level,
            precision=products,
            threads=threads,
            directory=out,
            cache=Cache.default(),
            dump=dump,
            progress=stage,
        )
    _answer(
        {
            "image": str(made.image_path),
            "model": str(made.model_path),
            "weights": str(made.weights_path),
            "cpu": level,
            "precision": precision,
            **({"native": Cpu.native_reasons(products)} if cpu == "native" else {}),
            "image_bytes": len(made.image.content),
            "digest": made.image.digest.hex(),
            "measurement": made.image.measurement.hex(),
        },
        as_json,
    )


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="An image, job, approval, evidence, receipt …")],
    plan: Annotated[
        bool, typer.Option("--plan", help="Of a model file: what was chosen for each layer.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a file says, as JSON. Shows only: nothing is verified.

    Example: myelin inspect job.cbor
    """
    if not plan:
        print(json.dumps(_inspect(file), indent=None if as_json else 2))
        return
    from myelin import recipe

    rows = recipe.plan(file.read_bytes()).decisions
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    _table(
        [
            ("layer", "kernel", "norm", "algorithm", "threads", "GFLOP", "predicted ms", "MiB"),
            *(
                (
                    row.layer,
                    row.kernel,
                    str(row.method or ""),
                    row.algorithm,
                    str(row.threads),
                    f"{row.gflop:.4f}",
                    f"{row.ms:.3f}",
                    f"{row.bytes / 2**20:.2f}",
                )
                for row in rows
            ),
            (
                *("total", f"{len(rows)} calls", "", "", ""),
                f"{sum(row.gflop for row in rows):.4f}",
                f"{sum(row.ms for row in rows):.3f}",
                "",
            ),
        ],
        to=_data_console,
    )


@app.command("job")
def write_job(
    build_folder: Annotated[Path, typer.Argument(help="The build folder.")],
    exchange: Annotated[Path, typer.Option(help="The exchange folder to make.")],
    records: Annotated[
        list[str], typer.Option(help="PUBLIC_FILE:CAPACITY of an owner of training records.")
    ],
    weights: Annotated[list[Path], typer.Option(help="Public file of a receiver of the weights.")],
    epsilon: Annotated[float, typer.Option(help="Epsilon to stay within.")],
    steps: Annotated[int, typer.Option(help="Training steps.")],
    sample_rate: Annotated[float, typer.Option(help="Probability of a record being in a step.")],
    max_grad_norm: Annotated[float, typer.Option(help="Clipping norm of a gradient.")] = 1.0,
    delta: Annotated[float, typer.Option(help="Delta.")] = 1e-5,
    test: Annotated[
        list[str] | None,
        typer.Option(
            help="PUBLIC_FILE:CAPACITY of an owner of test records; makes a score public."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a job into a new exchange folder.

    Example: myelin job build --exchange exchange --records a.pub:160 --records b.pub:160
    --weights r.pub --epsilon 2 --steps 50 --sample-rate 0.5
    """
    from myelin.exchange import Exchange, place
    from myelin.job import Job
    from myelin.party import PublicParty
    from myelin.recipe import Build

    senders = dict(_sender(text) for text in records)
    testers = dict(_sender(text) for text in test or [])
    built = Build.open(build_folder)
    for slot, owners in (("records", senders), ("test", testers)):
        room, asked = built.image.description["capacity"][slot], sum(owners.values())
        if asked > room:
            raise UsageError(
                f"the image has room for {room} {slot}, the senders' capacities add up to {asked}: "
                f"build it with --{slot} {asked}"
            )
    made = _privacy(epsilon, delta, max_grad_norm, sample_rate, steps, sum(senders.values()))
    job = Job.draft(
        image=built.image,
        weights=built.weights_digest,
        privacy=made,
        sends={"records": senders} | ({"test": testers} if testers else {}),
        receives={"weights": [PublicParty.load(path) for path in weights]}
        | ({"score": [None]} if testers else {}),
    )
    where = Exchange(folder=exchange)
    if where.job.exists():
        raise UsageError(f"{where.job} exists; a job is never overwritten, name another folder")
    for path in (where.image, where.model, where.weights):
        place(path, (build_folder / path.name).read_bytes())
    place(where.job, job.to_bytes())
    _table(
        [("what", "from", "seen by"), *((r.what, r.source, r.visible_to) for r in job.describe())]
    )
    _answer({"job": str(where.job), "digest": job.digest.hex(), "epsilon": made.epsilon}, as_json)


@app.command()
def approve(
    exchange: ExchangeFolder,
    key: Key,
    measurement: Annotated[
        str | None, typer.Option(help="The image's measurement as you know it, hex.")
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Rebuild the image here and compare.")
    ] = False,
    unchecked: Annotated[
        bool, typer.Option("--danger-unchecked-image", help="Approve an image nobody checked.")
    ] = False,
    party: Annotated[
        list[Path] | None,
        typer.Option(help="A public file that you trust; with any, all others must be given."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Approve the job of an exchange folder, after checking its image and reading its tables.

    The approved job is kept beside your key: grant and fetch believe that copy only.

    Example: myelin approve exchange --key north/hospital-north.key --rebuild
    """
    from myelin.exchange import Exchange, place
    from myelin.job import Job, keep_approved
    from myelin.party import Party, PublicParty

    if (measurement is not None) + rebuild + unchecked != 1:
        raise UsageError(
            "say how you know the image: --measurement HEX, --rebuild, or --danger-unchecked-image"
        )
    where, owner = Exchange(folder=exchange), Party.load(key)
    job = Job.from_bytes(where.job.read_bytes())
    index = _index(job, owner)
    pinned = [owner.public, *(PublicParty.load(path) for path in party or [])]
    _show(job, pinned)
    if party and (unknown := [one.name for one in job.parties if one not in pinned]):
        raise UsageError(f"not among the public files given: {', '.join(unknown)}; ask them")
    if measurement is not None and measurement.lower() != job.image.measurement.hex():
        raise ImageMismatch(
            f"the job names measurement {job.image.measurement.hex()}, you know {measurement}"
        )
    if rebuild:
        from myelin import recipe
        from myelin.image import Image

        with _stages() as stage:
            rebuilt = recipe.rebuild(where.model.read_bytes(), progress=stage)
        recipe.compare(rebuilt, job.image, original=Image.read(where.image))
    approval = where.approval(index)
    kept = keep_approved(job, key)
    place(approval, job.approve(owner))
    _answer(
        {
            "approval": str(approval),
            "job": job.digest.hex(),
            "kept": str(kept),
            "measurement": job.image.measurement.hex(),
            "image": "rebuilt" if rebuild else "unchecked" if unchecked else "as given",
        },
        as_json,
    )


@app.command("seal")
def seal_data(
    data: Annotated[Path, typer.Argument(help=".npz with x and y, or .csv with labels last.")],
    out: Annotated[Path, typer.Option(help="The sealed file; its key goes beside it.")],
    capacity: Annotated[int, typer.Option(help="Records to pad to, as in the job.")],
    labels: Annotated[
        str, typer.Option(help="class (whole numbers) or real (also for yes/no).")
    ] = "class",
    features: Annotated[
        str, typer.Option(help="How the image keeps features: float32, float16 or uint8.")
    ] = "float32",
    budget_epsilon: Annotated[
        float | None,
        typer.Option("--budget", help="Epsilon that training on this file may spend in all."),
    ] = None,
    delta: Annotated[float, typer.Option(help="Delta of the budget.")] = 1e-5,
    as_json: Json = False,
) -> None:
    """Encrypt a data set once. The file may lie anywhere; its key and its ledger stay with you.

    Training records need a --budget, test records must have none.

    Example: myelin seal north.csv --capacity 160 --labels real --budget 2 --out north.sealed
    """
    from myelin.grant import Ledger
    from myelin.seal import key_path, seal_records

    if budget_epsilon is not None and not (0 < budget_epsilon < math.inf and 0 < delta < 1):
        raise UsageError(f"a budget of epsilon {budget_epsilon}, delta {delta} is none")
    values, answers = _data(data, labels, features)
    with _bar("seal", None) as told:
        sealed = seal_records(values, answers, out, capacity=capacity, progress=told)
    ledger = _ledger_path(out)
    if budget_epsilon is not None:
        Ledger.create(ledger, commitment=sealed.commitment, epsilon=budget_epsilon, delta=delta)
    _answer(
        {
            "sealed": str(out),
            "key": str(key_path(out)),
            "ledger": None if budget_epsilon is None else str(ledger),
            "records": len(values),
            "commitment": sealed.commitment.hex(),
        },
        as_json,
    )


@app.command("grant")
def grant_key(
    exchange: ExchangeFolder,
    key: Key,
    sealed: Annotated[Path, typer.Option(help="Your sealed file; key and ledger lie beside it.")],
    policy: Annotated[Path, typer.Option(help="Your appraisal policy, TOML.")],
    slot: Annotated[str, typer.Option(help="records or test.")] = "records",
    wait_seconds: Annotated[float, typer.Option("--wait", help="Seconds to wait.")] = 600.0,
    as_json: Json = False,
) -> None:
    """Appraise the running enclave, debit your ledger, release your key to that enclave alone.

    Example: myelin grant exchange --key north.key --sealed north.sealed --policy policy.toml
    """
    from myelin.evidence import appraise
    from myelin.exchange import place, wait
    from myelin.grant import Ledger, grant
    from myelin.policy import Policy
    from myelin.seal import SealedKey, key_path

    where, job, party = _open(exchange, key)
    index = _index(job, party)
    rules = Policy.load(policy).for_job(job)
    if slot == "records" and not _ledger_path(sealed).exists():
        raise UsageError(f"{sealed} has no ledger: seal training records with --budget")
    book = Ledger.open(_ledger_path(sealed)) if slot == "records" else None
    secret = SealedKey.load(key_path(sealed))
    nonce = secrets.token_bytes(32)
    where.evidence(index).unlink(missing_ok=True)
    place(where.nonce(index), nonce)
    evidence = wait(
        where.evidence(index),
        seconds=wait_seconds,
        what="is `myelin run` running, with all approvals?",
    )
    endorsements = where.endorsements.read_text()
    appraised = appraise(evidence, endorsements, rules, nonce, int(time.time()))
    granted = grant(party, job, appraised, secret, slot=slot, ledger=book)
    if not where.sealed(slot, index).exists():
        with sealed.open("rb") as file:
            place(where.sealed(slot, index), iter(lambda: file.read(1 << 20), b""))
    place(where.grant(slot, index), granted)
    if rules.simulator_root is not None:
        _people.print("The TEE is simulated: nothing is protected from the machine it runs on.")
    _answer(
        {
            "grant": str(where.grant(slot, index)),
            "measurement": appraised.measurement.hex(),
            "tcb": appraised.platform.tcb_status,
            "simulated": rules.simulator_root is not None,
            "epsilon_spent": None if book is None else book.spent,
        },
        as_json,
    )


@app.command()
def run(
    exchange: ExchangeFolder,
    simulator: Annotated[
        Path, typer.Option(help="The simulator's world; made if missing. Its root says TEST.")
    ],
    backend: Annotated[str, typer.Option(help="process or kvm.")] = "process",
    wait_seconds: Annotated[
        float, typer.Option("--wait", help="Seconds to wait for parties.")
    ] = 600.0,
    as_json: Json = False,
) -> None:
    """Run the job of an exchange folder as the host, under a simulated TEE.

    Example: myelin run exchange --simulator world
    """
    from myelin.evidence.simulator import World
    from myelin.exchange import Exchange
    from myelin.service import serve

    _check_backend(backend)
    _people.print("The TEE is simulated: nothing is protected from this machine.")
    if not simulator.exists():
        World.create(simulator, now=int(time.time()))
    where = Exchange(folder=exchange)
    with _bar("train", "steps") as told:
        serve(
            where,
            attester=World.open(simulator),
            now=lambda: int(time.time()),
            backend="kvm" if backend == "kvm" else "process",
            wait_seconds=wait_seconds,
            say=lambda line: _people.print(line, markup=False),
            progress=told,
        )
    _answer({"receipt": str(where.receipt), "simulated": True}, as_json)


@app.command()
def fetch(
    exchange: ExchangeFolder,
    key: Key,
    policy: Annotated[Path, typer.Option(help="Your appraisal policy, TOML.")],
    out: Annotated[Path, typer.Option(help="Where the weights go, safetensors.")],
    as_json: Json = False,
) -> None:
    """Verify the receipt, then open the weights that were sealed to you.

    Example: myelin fetch exchange --key university.key --policy policy.toml
    --out weights.safetensors
    """
    import safetensors.numpy

    from myelin.image import Image
    from myelin.seal import open_output
    from myelin.weights import unpack

    where, job, party = _open(exchange, key)
    index = _index(job, party)
    if not any((one.slot, one.party) == ("weights", index) for one in job.receives):
        raise UsageError(f"{party.name!r} receives no weights in this job")
    rules = _rules(policy).for_job(job)
    verified = _verified(where.receipt, rules, where.endorsements, int(time.time()))
    plaintext = open_output(
        party,
        where.envelope("weights", index).read_bytes(),
        where.output("weights", index),
        job=job,
        slot="weights",
        digest=verified.output("weights", party.name).digest,
    )
    image = Image.read(where.image)
    if image.digest != job.image.digest:
        raise UsageError(f"{where.image} is not the job's image")
    values = unpack(image.description["parameters"], np.frombuffer(plaintext, np.float32))
    simulated = rules.simulator_root is not None
    notes = {"job": job.digest.hex(), "tee": "simulated" if simulated else "sgx"}
    out.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(values, out, metadata=notes)
    _answer({"weights": str(out), "parameters": sorted(values), "simulated": simulated}, as_json)


@app.command()
def verify(
    receipt: Annotated[Path, typer.Argument(help="A receipt file.")],
    policy: Annotated[Path, typer.Option(help="Your appraisal policy, TOML.")],
    job: Annotated[
        str | None,
        typer.Option(help="The job as you know it: its file, or its digest in hex."),
    ] = None,
    endorsements: Annotated[
        Path | None, typer.Option(help="Collateral, JSON; the receipt's neighbour if not given.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(help="Judge as at this time, such as 2026-11-24T12:00Z; now if not given."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify a receipt offline. Exit code 4 when it does not hold.

    The policy or --job must say which job or image you expect. Collateral expires: --at judges as
    at an earlier time.

    Example: myelin verify receipt.cbor --policy policy.toml --job job.cbor
    """
    from myelin.privacy import NEIGHBORING_RELATION

    rules = _rules(policy)
    if job is not None:
        rules = _expecting(rules, job)
    collateral = endorsements or receipt.parent / "endorsements.json"
    verified = _verified(receipt, rules, collateral, _seconds(at))
    _answer(
        {
            "job": verified.job.digest.hex(),
            "measurement": verified.job.image.measurement.hex(),
            "parties": {one.name: one.fingerprint for one in verified.job.parties},
            "simulated": verified.appraised.platform.authority == "simulator",
            "steps": verified.privacy.steps,
            "epsilon": verified.privacy.epsilon,
            "delta": verified.privacy.delta,
            "neighboring_relation": NEIGHBORING_RELATION,
            "inputs": {f"{one.slot} {one.party}": one.commitment.hex() for one in verified.inputs},
            "outputs": {f"{one.slot} {one.party}": one.digest.hex() for one in verified.outputs},
            "score": None if verified.score is None else verified.score.accuracy,
        },
        as_json,
    )


@app.command("rebuild")
def rebuild_image(
    job: Annotated[Path, typer.Argument(help="The job document.")],
    model: Annotated[Path, typer.Option(help="The model file.")],
    image: Annotated[
        Path | None, typer.Option(help="The original image, to say which part differs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Rebuild a job's image from its model file and compare measurements.

    Exit code 6 if they differ.

    Example: myelin rebuild exchange/job.cbor --model exchange/model.json
    """
    from myelin import recipe
    from myelin.image import Image
    from myelin.job import Job

    made = Job.from_bytes(job.read_bytes())
    with _stages() as stage:
        rebuilt = recipe.rebuild(model.read_bytes(), progress=stage)
    original = None if image is None else Image.read(image)
    recipe.compare(rebuilt, made.image, original=original)
    _answer({"measurement": rebuilt.measurement.hex(), "digest": rebuilt.digest.hex()}, as_json)


@app.command("demo")
def run_demo(
    folder: Annotated[
        Path | None, typer.Option(help="Where its files go; a temporary folder if not given.")
    ] = None,
    backend: Annotated[str, typer.Option(help="process or kvm.")] = "process",
    as_json: Json = False,
) -> None:
    """Three hospitals train one private model, every party played here.

    Example: myelin demo --json
    """
    from myelin import demo

    _check_backend(backend)
    teller = demo.Teller(
        say=lambda line: _people.print(line, markup=False),
        rows=lambda rows: _table(rows, header=False),
        track=_track,
    )
    where = Path(tempfile.mkdtemp(prefix="myelin-demo-")) if folder is None else folder
    facts = demo.run(where, teller, backend="kvm" if backend == "kvm" else "process")
    if as_json:
        print(json.dumps(facts))


# What the verbs share: reading their arguments, speaking.


def _privacy(
    epsilon: float, delta: float, max_grad_norm: float, sample_rate: float, steps: int, records: int
) -> Any:
    from myelin.privacy import Privacy

    return Privacy.for_epsilon(
        epsilon,
        delta=delta,
        max_grad_norm=max_grad_norm,
        sample_rate=sample_rate,
        steps=steps,
        records=records,
    )


def _open(folder: Path, key: Path) -> tuple[Any, Any, Any]:
    """Exchange, the job as this party approved it, the party."""
    from myelin.document import digest
    from myelin.exchange import Exchange
    from myelin.job import approved
    from myelin.party import Party

    where, party = Exchange(folder=folder), Party.load(key)
    return where, approved(digest(where.job.read_bytes()), key), party


def _show(job: Any, pinned: list[Any]) -> None:
    """What a party approves, in two tables."""
    spent = job.privacy
    _table(
        [
            ("job", job.digest.hex()),
            ("image measurement", job.image.measurement.hex()),
            ("privacy", f"epsilon {spent.epsilon:g}, delta {spent.delta:g}, {spent.steps} steps"),
            *(
                (
                    f"party {one.name}",
                    f"{one.fingerprint} {'known' if one in pinned else 'compare with them'}",
                )
                for one in job.parties
            ),
        ],
        header=False,
    )
    _table(
        [("what", "from", "seen by"), *((r.what, r.source, r.visible_to) for r in job.describe())]
    )


def _index(job: Any, party: Any) -> int:
    for index, member in enumerate(job.parties):
        if member == party.public:
            return index
    raise UsageError(f"{party.name!r} ({party.public.fingerprint}) is no party of this job")


def _sender(text: str) -> tuple[Any, int]:
    from myelin.party import PublicParty

    path, _, capacity = text.rpartition(":")
    if not path:
        raise UsageError(f"{text!r}: write PUBLIC_FILE:CAPACITY, such as north.pub:160")
    return PublicParty.load(path), _integers(capacity, "capacity")[0]


def _check_backend(backend: str) -> None:
    from myelin.cell import backends

    if backend not in backends():
        raise UsageError(f"backend {backend!r}: choose one of {', '.join(backends())}")


def _ledger_path(sealed: Path) -> Path:
    return sealed.with_name(sealed.name + ".ledger")


def _rules(policy: Path) -> Any:
    from myelin.policy import Policy

    rules = Policy.load(policy)
    if rules.simulator_root is not None:
        _people.print("The TEE was simulated: the receipt shows function, not confidentiality.")
    return rules


def _expecting(rules: Any, job: str) -> Any:
    from myelin.job import Job

    if Path(job).exists():
        return rules.for_job(Job.from_bytes(Path(job).read_bytes()))
    try:
        return replace(rules, job=bytes.fromhex(job))
    except ValueError:
        raise UsageError(f"job {job!r}: neither a file nor a digest in hex") from None


def _verified(receipt: Path, rules: Any, endorsements: Path, now: int) -> Any:
    from myelin.receipt import verify

    return verify(receipt.read_bytes(), rules, endorsements.read_text(), now)


def _seconds(at: str | None) -> int:
    if at is None:
        return int(time.time())
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        raise UsageError(f"time {at!r}: write it as 2026-11-24T12:00Z") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _integers(text: str, what: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{what} {text!r}: whole numbers, separated by commas") from None


def _optimizer(text: str) -> Any:
    from myelin.optimizer import SGD, Adam

    kinds: dict[str, Any] = {"sgd": SGD, "adam": Adam}
    name, *settings = text.split(",")
    if name not in kinds:
        raise UsageError(f"optimizer {name!r}: choose sgd or adam")
    values: dict[str, float] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in ("lr", "momentum", "weight_decay", "eps"):
            raise UsageError(f"optimizer setting {setting!r}: lr, momentum, weight_decay or eps")
        try:
            values[key] = float(value)
        except ValueError:
            raise UsageError(f"optimizer setting {setting!r}: not a number") from None
    try:
        return kinds[name](**values)
    except TypeError as error:
        raise UsageError(f"optimizer {text!r}: {error}") from None


def _features(text: str) -> Any:
    from myelin.features import Features

    name, *constants = text.split(",")
    try:
        unit, zero = map(float, constants) if constants else (0.0, 0.0)
    except ValueError:
        raise UsageError(f"features {text!r}: write uint8,UNIT,ZERO, such as uint8,255,0") from None
    return Features(type=name, unit=unit, zero=zero)


def _source(text: str) -> Any:
    """An ONNX path, or an object from a Python file of the builder's own."""
    path, _, name = text.rpartition(":")
    if not path.endswith(".py"):
        if not text.endswith(".onnx"):
            raise UsageError(f"model {text!r}: an .onnx file, or FILE.py:NAME")
        return Path(text)
    spec = importlib.util.spec_from_file_location("model", path)
    if spec is None or spec.loader is None or not Path(path).exists():
        raise UsageError(f"{path} cannot be read")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        found = getattr(module, name)
    except AttributeError:
        raise UsageError(f"{path} holds no {name!r}") from None
    return found() if inspection.isfunction(found) else found


def _data(path: Path, labels: str, kind: str) -> tuple[Any, Any]:
    """Features [n, …] of the asked type and labels of a file; int32 classes or float32 reals."""
    from myelin.features import BYTES

    if labels not in ("class", "real"):
        raise UsageError(f"labels {labels!r}: class or real")
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                held = {name: file[name] for name in file.files}
        except (ValueError, zipfile.BadZipFile, EOFError) as error:
            raise UsageError(f"{path} is no .npz file of plain arrays: {error}") from None
        if not {"x", "y"} <= set(held):
            raise UsageError(f"{path} holds {', '.join(held)}; it must hold x and y")
        features, answers = held["x"], held["y"]
    elif path.suffix == ".csv":
        try:
            table = np.loadtxt(path, delimiter=",", ndmin=2, dtype=np.float64)
        except ValueError as error:
            raise UsageError(f"{path}: {error}; numbers only, no heading") from None
        if table.shape[1] < 2:
            raise UsageError(f"{path} holds {table.size} numbers; it needs features and a label")
        features, answers = table[:, :-1], table[:, -1]
    else:
        raise UsageError(f"{path}: .npz or .csv")
    if kind not in BYTES:
        raise UsageError(f"features {kind!r}: choose one of {', '.join(BYTES)}")
    features, given = features.astype(kind), features
    if kind == "uint8" and (features != given).any():
        raise UsageError(f"{path}: uint8 features must be whole numbers from 0 to 255")
    if labels == "class":
        whole = answers.astype(np.int32)
        if (whole != answers).any():
            raise UsageError(f"{path}: class labels must be whole numbers; or give --labels real")
        return features, whole.reshape(-1)
    return features, answers.astype(np.float32).reshape(len(answers), -1)


def _inspect(path: Path) -> Any:
    from myelin import document
    from myelin.image import Image
    from myelin.seal import MAGIC

    content = path.read_bytes()
    if content[:4] == b"\x7fELF":
        image = Image(content=content)
        return {
            "digest": image.digest.hex(),
            "measurement": image.measurement.hex(),
            "description": _readable(image.description),
        }
    if content[:1] in (b"#", b"{", b"t"):
        raise UsageError(f"{path} is a text file: read it as it is (a .key only by its owner)")
    if content[:16] == MAGIC:
        length, chunk = struct.unpack_from("<QI", content, 80)
        return {"type": "myelin/sealed/1", "plaintext bytes": length, "chunk bytes": chunk}
    return _readable(document.decode(content, lambda value, where: None, limit=1 << 24))


def _readable(value: Any) -> Any:
    """CBOR as JSON: bytes that are themselves a document are opened, others become hex."""
    from myelin import document
    from myelin.errors import DocumentInvalid

    if isinstance(value, dict):
        return {key: _readable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_readable(item) for item in value]
    if isinstance(value, bytes):
        try:
            inner = document.decode(value, lambda value, where: None, limit=1 << 24)
        except DocumentInvalid:
            return value.hex()
        return _readable(inner) if isinstance(inner, dict) else value.hex()
    return value


def _answer(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            for key, item in value.items():
                print(f"{name}  {key}  {item}")
        else:
            print(f"{name}  {value}")


def _table(rows: list[tuple[str, ...]], *, header: bool = True, to: Console = _people) -> None:
    table = Table(show_header=header, box=None, padding=(0, 0, 0, 3))
    # The last column is not folded: paths and digests stay whole.
    for number, title in enumerate(rows[0]):
        last = number == len(rows[0]) - 1
        table.add_column(title if header else "", no_wrap=last, overflow="fold")
    for row in rows[1:] if header else rows:
        table.add_row(*row)
    to.print(table, soft_wrap=not header)


@contextmanager
def _bar(what: str, unit: str | None) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
    counted = (MofNCompleteColumn(), TextColumn(unit or ""), TimeElapsedColumn())
    with Progress(*columns, *(counted if unit else ()), console=_people, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _track(steps: int) -> Iterator[Callable[[int], None]]:
    with _bar("   train", "steps") as told:
        yield lambda done: told(done, steps)


@contextmanager
def _stages() -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=_people, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda stage, done, total: bar.update(
            task, description=stage, completed=done, total=total
        )
