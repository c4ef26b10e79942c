//! Drives every virtio device as no driver should, and the network behind a card from both sides, for as long as wanted.
//! Usage: fuzz-devices [--minutes N | --count N] [--seed N] [--steps N] [--only devices|network]. Exit status: 0 nothing found, 1 something, 2 bad usage.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use io::network::nat::testing::run as network;
use io::virtio::testing::{Kind, run, watch_panics};

struct Options {
    time: Duration,
    count: u64,
    seed: u64,
    steps: usize,
    devices: bool,
    network: bool,
}

fn options() -> Result<Options, String> {
    let mut options =
        Options { time: Duration::from_secs(60), count: u64::MAX, seed: 1, steps: 500, devices: true, network: true };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        let number = || value.parse::<u64>().map_err(|error| format!("{value}: {error}"));
        match word.as_str() {
            "--minutes" => {
                let minutes: f64 = value.parse().map_err(|error| format!("{value}: {error}"))?;
                options.time = Duration::try_from_secs_f64(minutes * 60.0).map_err(|error| error.to_string())?;
            }
            "--count" => options.count = number()?,
            "--seed" => options.seed = number()?,
            "--steps" => options.steps = number()? as usize,
            "--only" if value == "devices" => options.network = false,
            "--only" if value == "network" => options.devices = false,
            _ => return Err(format!("no option {word}")),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("fuzz-devices: {error}");
            return ExitCode::from(2);
        }
    };
    watch_panics();
    let begin = Instant::now();
    let (mut seeds, mut found) = (0, 0);
    while begin.elapsed() < options.time && seeds < options.count {
        let seed = options.seed.wrapping_add(seeds);
        for kind in Kind::ALL.into_iter().filter(|_| options.devices) {
            if let Err(finding) = run(kind, seed, options.steps) {
                println!("{:?} with --seed {} --steps {}: {}", finding.kind, seed, options.steps, finding.what);
                found += 1;
            }
        }
        if options.network
            && let Err(what) = network(seed, options.steps)
        {
            println!("the network behind a card with --seed {seed} --steps {}: {what}", options.steps);
            found += 1;
        }
        seeds += 1;
    }
    println!(
        "{seeds} seeds, {} devices and a network each, {} steps for one: {found} findings",
        Kind::ALL.len(),
        options.steps
    );
    if found == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
