//! Logs go to standard error, one line per event, with upstream's `--v` verbosity.

use clap::Args;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Flags that every component has.
#[derive(Args, Clone, Debug, Default)]
pub struct LogArgs {
    /// Log verbosity: 0 is information, 4 is debugging, 6 and more is tracing.
    #[arg(short = 'v', long = "v", default_value_t = 0, value_name = "LEVEL")]
    pub verbosity: u8,
    /// Log levels of single modules, as `module=level,…`, over what --v says.
    #[arg(long, value_name = "MODULE=LEVEL,…", default_value = "")]
    pub vmodule: String,
}

impl LogArgs {
    pub(super) fn init(&self) {
        let level = match self.verbosity {
            0..=3 => LevelFilter::INFO,
            4 | 5 => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        };
        // Libraries below the components are only heard from when something is wrong, unless asked for.
        let library = if self.verbosity >= 8 { level } else { LevelFilter::WARN };
        let mut targets = Targets::new().with_default(level);
        for name in [
            "h2",
            "hyper",
            "hyper_util",
            "rustls",
            "tower",
            "tonic",
            "tokio_tungstenite",
            "tungstenite",
            "kube_client",
            "netlink_proto",
        ] {
            targets = targets.with_target(name, library);
        }
        match self.vmodule.parse::<Targets>() {
            Ok(extra) => targets.extend(extra.iter().map(|(name, level)| (name.to_owned(), level))),
            Err(error) => eprintln!("ignoring --vmodule={}: {error}", self.vmodule),
        }
        let format = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
        let _ = tracing_subscriber::registry().with(targets).with(format).try_init();
    }
}
