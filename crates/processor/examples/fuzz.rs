//! Compares an engine with the host's processor on random instruction sequences, for as long as wanted.
//! Usage: fuzz [--engine interpret|translate] [--minutes N | --count N] [--seed N]
//! [--kinds integer|simd|x87|sse|avx|state|pointers|all] [--ring user|kernel] [--keep-going] [--lenient] [--list] [--seeds]. Exit status: 0 all agreed, 1 a disagreement, 2 bad usage.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use processor::testing::{Campaign, Kinds, Ring, engine};

struct Options {
    engine: String,
    time: Duration,
    count: u64,
    seed: u64,
    /// None: all of them in turn.
    kinds: Option<Kinds>,
    ring: Option<Ring>,
    keep_going: bool,
    /// Arithmetic flags at a trap do not count.
    lenient: bool,
    list: bool,
    seeds: bool,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        engine: "interpret".to_owned(),
        time: Duration::from_secs(60),
        count: u64::MAX,
        seed: 1,
        kinds: None,
        ring: None,
        keep_going: false,
        lenient: false,
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
            "--kinds" => {
                let name = value()?;
                let kinds = Kinds::named(&name).ok_or_else(|| format!("no kinds of instruction called {name}"))?;
                options.kinds = Some(kinds);
            }
            "--ring" => {
                options.ring = match value()?.as_str() {
                    "user" => Some(Ring::User),
                    "kernel" => Some(Ring::Kernel),
                    other => return Err(format!("no ring called {other}")),
                }
            }
            "--lenient" => options.lenient = true,
            "--keep-going" => options.keep_going = true,
            "--list" => options.list = true,
            "--seeds" => options.seeds = true,
            _ => return Err(format!("unknown option {word}")),
        }
    }
    Ok(options)
}

/// What the options ask for; without any, each kind of sequence in turn, in either ring.
fn campaigns(options: &Options) -> Result<Vec<Campaign>, String> {
    // The translator forgets x87 instruction pointers whenever it saves the state.
    let state = if options.engine == "interpret" { Kinds::POINTERS } else { Kinds::STATE };
    let kinds = options.kinds.map_or_else(|| vec![Kinds::INTEGER, Kinds::SIMD, Kinds::ALL, state], |one| vec![one]);
    let rings = options.ring.map_or_else(|| vec![Ring::User, Ring::Kernel], |one| vec![one]);
    let mut campaigns = Vec::new();
    for kinds in kinds {
        for ring in &rings {
            let mut campaign = Campaign::new(engine(&options.engine)?, kinds, *ring).map_err(|e| e.to_string())?;
            campaign.lenient = options.lenient;
            campaigns.push(campaign);
        }
    }
    Ok(campaigns)
}

fn run(options: &Options) -> Result<bool, String> {
    let mut campaigns = campaigns(options)?;
    let start = Instant::now();
    let mut told = start;
    let mut bad = 0_u64;
    let mut seed = options.seed;
    let last = options.seed.saturating_add(options.count);
    'all: while seed < last && start.elapsed() < options.time {
        for campaign in &mut campaigns {
            if options.seeds {
                eprintln!("seed {seed} {campaign}");
            }
            if options.list {
                print!("seed {seed} {campaign}\n{}", campaign.list(seed));
            }
            if let Err(disagreement) = campaign.check(seed) {
                println!("{campaign} {disagreement}");
                bad += 1;
                if !options.keep_going {
                    break 'all;
                }
            }
        }
        seed += 1;
        if told.elapsed() > Duration::from_secs(30) {
            told = Instant::now();
            eprintln!("{} seeds, {bad} disagreements", seed - options.seed);
        }
    }
    let runs: u64 = campaigns.iter().map(|campaign| campaign.runs).sum();
    let traps: u64 = campaigns.iter().map(|campaign| campaign.traps).sum();
    let seeds = seed - options.seed;
    let unsteady: u64 = campaigns.iter().map(|campaign| campaign.unsteady).sum();
    println!(
        "{seeds} seeds, {runs} runs of which {traps} ended in a trap, {bad} disagreements, {unsteady} that did not come again"
    );
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
