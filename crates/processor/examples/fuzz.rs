//! Compares an engine with the host's processor on random instruction sequences, for as long as wanted.
//! Usage: fuzz [--engine interpret|translate] [--minutes N | --count N] [--seed N] [--kinds integer|simd|x87|sse|avx|state|all]
//! [--ring user|kernel] [--keep-going] [--list] [--seeds]. Exit status: 0 all agreed, 1 a disagreement, 2 bad usage.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use processor::testing::{Campaign, Kinds, Ring, engine};

struct Options {
    engine: String,
    time: Duration,
    count: u64,
    seed: u64,
    kinds: Kinds,
    ring: Ring,
    keep_going: bool,
    list: bool,
    seeds: bool,
}

fn kinds(name: &str) -> Result<Kinds, String> {
    Ok(match name {
        "integer" => Kinds::INTEGER,
        "simd" => Kinds::SIMD,
        "all" => Kinds::ALL,
        "state" => Kinds::STATE,
        "x87" => Kinds { x87: true, ..Kinds::NONE },
        "sse" => Kinds { sse: true, ..Kinds::NONE },
        "avx" => Kinds { avx: true, ..Kinds::NONE },
        _ => return Err(format!("no kinds of instruction called {name}")),
    })
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        engine: "interpret".to_owned(),
        time: Duration::from_secs(60),
        count: u64::MAX,
        seed: 1,
        kinds: Kinds::ALL,
        ring: Ring::User,
        keep_going: false,
        list: false,
        seeds: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|e| format!("{text}: {e}"));
        match word.as_str() {
            "--engine" => options.engine = value()?,
            "--minutes" => {
                let text = value()?;
                let minutes: f64 = text.parse().map_err(|e| format!("{text}: {e}"))?;
                options.time = Duration::try_from_secs_f64(minutes * 60.0).map_err(|e| e.to_string())?;
            }
            "--count" => options.count = number(value()?)?,
            "--seed" => options.seed = number(value()?)?,
            "--kinds" => options.kinds = kinds(&value()?)?,
            "--ring" => {
                options.ring = match value()?.as_str() {
                    "user" => Ring::User,
                    "kernel" => Ring::Kernel,
                    other => return Err(format!("no ring called {other}")),
                }
            }
            "--keep-going" => options.keep_going = true,
            "--list" => options.list = true,
            "--seeds" => options.seeds = true,
            _ => return Err(format!("unknown option {word}")),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> Result<bool, String> {
    let mut campaign =
        Campaign::new(engine(&options.engine)?, options.kinds, options.ring).map_err(|e| e.to_string())?;
    let start = Instant::now();
    let mut told = start;
    let mut bad = 0_u64;
    let mut seed = options.seed;
    let last = options.seed.saturating_add(options.count);
    while seed < last && start.elapsed() < options.time {
        if options.seeds {
            eprintln!("seed {seed}");
        }
        if options.list {
            print!("seed {seed}\n{}", campaign.list(seed));
        }
        if let Err(disagreement) = campaign.check(seed) {
            println!("{disagreement}");
            bad += 1;
            if !options.keep_going {
                break;
            }
        }
        seed += 1;
        if told.elapsed() > Duration::from_secs(30) {
            told = Instant::now();
            eprintln!("{} sequences, {bad} disagreements", seed - options.seed);
        }
    }
    let (runs, traps) = (campaign.runs, campaign.traps);
    println!("{} sequences, {runs} runs of which {traps} ended in a trap, {bad} disagreements", seed - options.seed);
    Ok(bad == 0)
}

fn main() -> ExitCode {
    match options().and_then(|options| run(&options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(why) => {
            eprintln!("fuzz: {why}");
            ExitCode::from(2)
        }
    }
}
