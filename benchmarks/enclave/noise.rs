//! Samples a second of `Noise::release` and bytes a second of the generator, on one core: `cargo run --release --example speed`.

mod median;

use median::median;
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
        let seconds = median(101, || noise.release(&sums, &mut out, scale));
        println!(
            "{count:>9} sums: {:5.0} M samples/s",
            count as f64 / seconds / 1e6
        );
    }
    let mut bytes = vec![0; 1 << 16];
    let seconds = median(101, || generator.fill(&mut bytes));
    println!("generator: {:.1} GB/s", bytes.len() as f64 / seconds / 1e9);
}
