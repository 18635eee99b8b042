//! Packet filter rules beside the routes: traffic that leaves the pod network gets the node's address, and traffic of
//! the pod network is accepted in forwarding. Written as whole scripts that are applied in one transaction and can be
//! applied again at any time; other programs' rules are never touched.

mod iptables;
mod nft;
mod ruleset;
mod run;

use std::time::Duration;

use apimachinery::process::error_chain;
use ipnet::IpNet;

pub use self::ruleset::RulesetError;
use self::ruleset::{Place, Ruleset};
pub use self::run::FirewallError;
use crate::family::Family;

/// How often it is asked whether any program has changed any rule. The question is one small message; listening to the
/// kernel's reports instead would make every change of a program with many rules slower.
const LOOK: Duration = Duration::from_secs(1);
/// How often the rules are made sure of in any case.
const RESYNC: Duration = Duration::from_secs(60);
/// The same with legacy iptables, where nothing can be asked.
const LEGACY_RESYNC: Duration = Duration::from_secs(5);

/// kube-proxy's mark on packets that it masquerades itself.
const KUBE_PROXY_MARK: &str = "0x4000/0x4000";

/// Which tool's tables hold the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Firewall {
    Nftables,
    Iptables,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// The pod network and this node's subnet, for each family.
    pub subnets: Vec<(IpNet, IpNet)>,
    pub masquerade: bool,
    /// Choose source ports at random, which avoids collisions of parallel connections.
    pub random_fully: bool,
    pub forward: bool,
}

fn multicast(family: Family) -> &'static str {
    match family {
        Family::V4 => "224.0.0.0/4",
        Family::V6 => "ff00::/8",
    }
}

impl Firewall {
    /// Makes the kernel have exactly these rules of ours.
    pub async fn apply(self, rules: &Rules) -> Result<(), FirewallError> {
        match self {
            Self::Nftables => nft::apply(rules).await,
            Self::Iptables => iptables::apply(rules).await,
        }
    }

    /// Removes what the other tool's tables still have from an earlier configuration. Where that tool is not installed
    /// there is nothing to remove.
    pub async fn clean_up_other(self) {
        let result = match self {
            Self::Nftables => iptables::clean_up().await,
            Self::Iptables => nft::clean_up().await,
        };
        if let Err(error) = result {
            tracing::debug!(error = error_chain(&error), "cannot look for rules of the other packet filter tool");
        }
    }

    fn places(self, rules: &Rules) -> Vec<Place> {
        let families = rules.subnets.iter().map(|(network, _)| Family::of_net(*network));
        match self {
            Self::Nftables => families.map(nft::place).collect(),
            Self::Iptables => families.flat_map(|family| iptables::places(family, rules)).collect(),
        }
    }
}

/// Other programs flush tables now and then; ours are put back. Never returns.
pub async fn keep(firewall: Firewall, rules: Rules, every: Option<Duration>) {
    let legacy = firewall == Firewall::Iptables && iptables::is_legacy().await;
    let every = every.unwrap_or(if legacy { LEGACY_RESYNC } else { RESYNC });
    if legacy {
        loop {
            tokio::time::sleep(every).await;
            report(firewall.apply(&rules).await.map_err(KeepError::from));
        }
    }
    let mut watched = Watched { firewall, places: firewall.places(&rules), rules, generation: None, handles: None };
    let mut since = tokio::time::Instant::now();
    loop {
        let due = since.elapsed() >= every;
        let looked = watched.look(due).await;
        // What went wrong will hardly be right a second later.
        let pause = if looked.is_ok() { LOOK.min(every) } else { LEGACY_RESYNC.min(every) };
        report(looked);
        if due {
            since = tokio::time::Instant::now();
        }
        tokio::time::sleep(pause).await;
    }
}

fn report(result: Result<(), KeepError>) {
    if let Err(error) = result {
        tracing::warn!(error = error_chain(&error), "cannot make sure of the packet filter rules");
    }
}

#[derive(Debug, thiserror::Error)]
enum KeepError {
    #[error("cannot read the kernel's rules")]
    Read(#[from] RulesetError),
    #[error("cannot write the rules")]
    Write(#[from] FirewallError),
}

/// Rules that were applied, and the numbers that the kernel has given them. A rule that is changed or made again has
/// another number.
struct Watched {
    firewall: Firewall,
    rules: Rules,
    places: Vec<Place>,
    /// Grows with every change of any rule.
    generation: Option<u32>,
    handles: Option<Vec<u64>>,
}

impl Watched {
    /// Compares when something has changed, or when it is due anyway.
    async fn look(&mut self, due: bool) -> Result<(), KeepError> {
        let mut ruleset = Ruleset::open()?;
        let generation = ruleset.generation().await?;
        if self.generation == Some(generation) && !due {
            return Ok(());
        }
        let handles = ruleset.handles(&self.places).await?;
        if self.handles.as_ref() != Some(&handles) {
            // The first look comes right after the rules were applied for the first time.
            if self.handles.is_some() {
                tracing::info!("somebody changed the packet filter rules; putting them back");
                self.handles = None;
                self.firewall.apply(&self.rules).await?;
            }
            let handles = ruleset.handles(&self.places).await?;
            tracing::info!(rules = handles.len(), "watching the packet filter rules");
            self.handles = Some(handles);
        }
        self.generation = Some(generation);
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    pub fn rules() -> Rules {
        let net = |text: &str| text.parse().unwrap();
        Rules {
            subnets: vec![(net("10.244.0.0/16"), net("10.244.1.0/24")), (net("fd00::/48"), net("fd00:0:0:1::/64"))],
            masquerade: true,
            random_fully: true,
            forward: true,
        }
    }
}
