"""Three hospitals train one private model inside an enclave. The TEE is simulated here."""

import secrets
import time
from io import BytesIO
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

import myelin
from myelin import hospitals, nn, receipt, seal
from myelin.grant import grant

folder, now = Path(mkdtemp(prefix="hospitals-")), int(time.time())
data, test = hospitals.load()  # records of three hospitals, test records of a registry
senders = {name: myelin.Party.generate(name) for name in (*data, "Registry")}
university = myelin.Party.generate("University")

privacy = myelin.Privacy.for_epsilon(
    2.0, delta=1e-5, max_grad_norm=0.1, sample_rate=0.5, steps=200, records=480
)
net, sgd = nn.Sequential(nn.Linear(30, 1)), myelin.SGD(lr=1.0, momentum=0.9)
room = {"records": 480, "test": 160, "directory": folder}
built = myelin.build(net, np.zeros((1, 30)), loss="binary-cross-entropy", optimizer=sgd, **room)
owners = {senders[name].public: 160 for name in data}
job = myelin.Job.draft(
    image=built.image,
    weights=built.weights_digest,
    privacy=privacy,
    sends={"records": owners, "test": {senders["Registry"].public: 160}},
    receives={"weights": [university.public], "score": [None]},
)
world = myelin.World.create(folder / "simulator", now=now)
policy = myelin.Policy.dangerous_simulation(world.root).for_job(job)
parts = {"image": built.image_path, "weights": built.weights_path, "attester": world}
with myelin.Service(job=job, **parts) as service:
    for party in (*senders.values(), university):
        service.approve(job.approve(party))
    collateral = service.endorsements(now=now)
    for index, (name, records) in enumerate({**data, "Registry": test}.items()):
        file, nonce, budget = BytesIO(), secrets.token_bytes(32), {"epsilon": 2, "delta": 1e-5}
        key = seal.seal_records(records.features, records.labels, file, capacity=160)
        fresh = myelin.appraise(service.evidence(nonce), collateral, policy, nonce, now)
        slot = {"slot": job.sends[index].slot}
        if name in data:  # training records have a privacy budget
            slot["ledger"] = myelin.Ledger.create(
                folder / name, commitment=key.commitment, **budget
            )
        file.seek(0)
        service.accept(index, grant(senders[name], job, fresh, key, **slot), file)
    service.train()
    proof = receipt.verify(service.finish(), policy, collateral, now)
    (output,) = service.outputs()
    sealed = BytesIO(b"".join(output.sealed))
digest = proof.output("weights", university.name).digest
flat = seal.open_output(university, output.envelope, sealed, job=job, slot="weights", digest=digest)
weights = myelin.unpack(built.image.description["parameters"], np.frombuffer(flat, np.float32))
print("the university's weights:", {name: value.shape for name, value in weights.items()})
print(f"test accuracy {proof.score.accuracy:.3f}, epsilon {proof.privacy.epsilon:.3f} (simulated)")
