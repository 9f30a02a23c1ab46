use kvar_sim::scenario::{Focus, Wanted, run};
#[test]
fn dbg() {
    let from: u64 = std::env::var("SEED").unwrap().parse().unwrap();
    let to: u64 = std::env::var("TO").map_or(from + 1, |t| t.parse().unwrap());
    for seed in from..to {
        let wanted = Wanted {
            focus: Some(Focus::Below),
            trace_steps: Some(if to > from + 1 { 10 } else { 100_000 }),
            ..Wanted::default()
        };
        let ran = run(seed, wanted);
        if seed == from {
            println!("{:?}", ran.tally);
        }
        if let Some(f) = ran.failure {
            for l in f.trace {
                println!("{l}");
            }
            println!("FAIL {seed} {:?} {}", ran.temper, f.what);
        }
    }
}
