//! Samples a second of `Noise::release` and bytes a second of the generator, on one core: `cargo run --release --example speed`.

use std::time::Instant;

use myelin_noise::{Generator, Noise, Scale};

fn main() {
    let mut generator = Generator::new(&[7; 32]);
    let Some(scale) = Scale::new(1.0, 1.0, 256.0) else {
        return;
    };
    let mut noise = Noise::new(generator.fork());
    for count in [26_010, 240_640, 2_304_000] {
        let sums = vec![0.25; count];
        let mut out = vec![0.0; count];
        let seconds = median(|| noise.release(&sums, &mut out, scale));
        println!("{count:>9} sums: {:5.0} M samples/s", count as f64 / seconds / 1e6);
    }
    let mut bytes = vec![0; 1 << 16];
    let seconds = median(|| generator.fill(&mut bytes));
    println!("generator: {:.1} GB/s", bytes.len() as f64 / seconds / 1e9);
}

/// Median seconds of 101 runs.
fn median(mut run: impl FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..101)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}
