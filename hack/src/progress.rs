//! Tells the user what is going on, step by step, with the time since the start. On a terminal the step under way
//! spins; elsewhere each finished step is one line.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

pub struct Progress {
    start: Instant,
    bar: ProgressBar,
}

impl Progress {
    pub fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{elapsed:>6} {spinner} {msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        Self { start: Instant::now(), bar }
    }

    /// Names the step that begins now.
    pub fn step(&self, what: impl Into<String>) {
        self.bar.set_message(what.into());
    }

    /// Reports something that is done.
    pub fn done(&self, what: &str) {
        let line = format!("{:6.1}s {what}", self.elapsed().as_secs_f64());
        if self.bar.is_hidden() { println!("{line}") } else { self.bar.println(line) }
    }

    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
