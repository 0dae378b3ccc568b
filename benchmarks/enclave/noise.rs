//! Millions of samples a second of `Noise::release`, by the number of sums, on one core. Prints JSON;
//! `python -m benchmarks.noise` builds it with build.sh and runs it.

mod median;

use median::median;
use myelin_noise::{Generator, Noise, Scale};

fn main() {
    let Some(scale) = Scale::new(1.0, 1.0, 256.0) else {
        return;
    };
    let mut noise = Noise::new(Generator::new(&[7; 32]));
    let rates = [26_010, 240_640, 2_304_000].map(|count| {
        let sums = vec![0.25; count];
        let mut out = vec![0.0; count];
        let seconds = median(301, || noise.release(&sums, &mut out, scale));
        format!("\"{count}\": {:.1}", count as f64 / seconds / 1e6)
    });
    println!("{{{}}}", rates.join(", "));
}
