"""Write the vectors of the noise tests, from mpmath and `cryptography`: python make_vectors.py

pairs.txt    three random words -> the two Gaussians that they stand for
release.txt  key 0, 1, ... 31, sums and scale -> the integers k of a release
rounded.txt  spread σ/g and shift S/g -> distribution function of k
"""

import random
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from mpmath import cos, erfc, floor, log, mp, mpf, nint, nstr, pi, sin, sqrt

mp.prec = 300
VECTORS = Path(__file__).parent / "vectors"
WORD = 2**64 - 1


def pair(w0: int, w1: int, w2: int) -> tuple[mpf, mpf]:
    """Box-Muller: 104 bits of radius, 52 of an angle, bit 0 a sign, bit 1 a swap."""
    u = mpf((w0 >> 12) * 2**52 + (w1 >> 12)) / 2**104 + mpf(2) ** -105
    radius = sqrt(-2 * log(u)) if u < 1 else mpf(0)
    angle = (mpf(w2 >> 12) / 2**52 - mpf("0.5") + mpf(2) ** -53) * pi / 2
    first, second = (-1) ** (w2 & 1) * cos(angle), sin(angle)
    if w2 & 2:
        first, second = second, first
    return radius * first, radius * second


def pairs() -> list[str]:
    """Corners of every word, then random ones, small radii and large."""
    corners = [
        0,
        1,
        2,
        3,
        4095,
        4096,
        WORD,
        WORD - 4095,
        1 << 63,
        (1 << 63) - 1,
        0xB504F333F9DE6484,
    ]
    draw = random.Random(1)
    words = [
        (a, b, c) for a in corners for b in (0, WORD, 1 << 63) for c in (0, 1, 2, 3, WORD, 1 << 63)
    ]
    words += [
        (draw.getrandbits(64), draw.getrandbits(64), draw.getrandbits(64)) for _ in range(300)
    ]
    words += [
        (WORD - draw.getrandbits(n), draw.getrandbits(64), draw.getrandbits(64))
        for n in range(12, 64)
    ]
    words += [
        (draw.getrandbits(n), draw.getrandbits(64), draw.getrandbits(64)) for n in range(12, 64)
    ]
    rows = []
    for a, b, c in words:
        z0, z1 = pair(a, b, c)
        rows.append(f"{a:016x} {b:016x} {c:016x} {nstr(z0, 20)} {nstr(z1, 20)}")
    return rows


def release() -> list[str]:
    """k of 3,000 sums, three blocks of random words, the last one short; σ = 1.25, g = 1/32."""
    count = 3000
    sums = [(-1) ** i * i**3 / 1024 for i in range(count)]
    blocks = -(-count // 8) * 6
    key = Cipher(algorithms.AES(bytes(range(32))), modes.CTR(bytes(16))).encryptor()
    stream = key.update(bytes(16 * blocks))
    words = [int.from_bytes(stream[i : i + 8], "little") for i in range(0, len(stream), 8)]
    rows = []
    for i, total in enumerate(sums):
        group, lane, second = words[i // 8 * 12 :][:12], i % 4, i % 8 // 4
        z = pair(group[lane], group[4 + lane], group[8 + lane])[second]
        exact = (mpf(total) + mpf("1.25") * z) * 32
        k = int(nint(exact))
        assert abs(exact - floor(exact) - mpf("0.5")) > mpf(2) ** -30, "too near a tie"
        rows.append(f"{total!r} {k}")
    return rows


def rounded() -> list[str]:
    """P(round(shift + spread z) <= k) for every k within 7 σ."""
    rows = []
    for spread, shift in ((32, "0"), (32, "0.375"), (60, "-0.5")):
        for k in range(-7 * spread, 7 * spread + 1):
            probability = erfc(-(k + mpf("0.5") - mpf(shift)) / spread / sqrt(2)) / 2
            rows.append(f"{spread} {shift} {k} {nstr(probability, 20)}")
    return rows


if __name__ == "__main__":
    VECTORS.mkdir(exist_ok=True)
    for name, rows in (("pairs", pairs()), ("release", release()), ("rounded", rounded())):
        (VECTORS / f"{name}.txt").write_text("\n".join(rows) + "\n")
