//! The iptables backend, for hosts without nftables and for set-ups that expect upstream's chains. What is wanted is
//! the text of [`script`]; only chains whose text changed are given to `iptables-restore --noflush`, which replaces
//! them all at once. Chains of others stay as they are.

mod script;

use crate::host::{self, HostError};
use crate::model::Family;
use crate::nftables::Settings;
use crate::plan::Plans;

pub use script::Extras;
use script::{Applied, FOREIGN_TO_LOOPBACK, SHARED_CHAIN, SIGNS, is_ours, jumps, removal, tables};

const TABLES: [&str; 2] = ["filter", "nat"];

/// Installs plans, and remembers what is installed, by family.
pub struct Backend {
    extras: Extras,
    applied: [Option<[Applied; 2]>; 2],
}

impl Backend {
    pub fn new(extras: Extras) -> Self {
        Self { extras, applied: [None, None] }
    }

    pub async fn sync(&mut self, settings: &Settings, plans: &Plans) -> Result<(), HostError> {
        let family = settings.family;
        let known = self.applied[family as usize].take();
        let first = known.is_none();
        let has = match known {
            Some(known) => known,
            None => [existing(family, TABLES[0]).await?, existing(family, TABLES[1]).await?],
        };
        let tables = tables(plans, settings, self.extras);
        let wanted = [tables[0].applied(), tables[1].applied()];
        let parts = tables.iter().zip(&has).zip(&wanted);
        let script: String = parts.filter_map(|((table, has), wanted)| table.script(has, wanted)).collect();
        if !script.is_empty() {
            host::iptables_restore(family, &script).await?;
        }
        if first {
            for jump in jumps() {
                host::iptables_ensure(family, jump.table, jump.chain, &jump.rule).await?;
            }
        }
        // Only now: after a failure, what is there must be looked up again.
        self.applied[family as usize] = Some(wanted);
        Ok(())
    }

    /// Whether our rules are still there; if not, everything is installed again next time. Both our chains and the
    /// ways into them: tools that reload a firewall restore neither.
    pub async fn verify(&mut self, family: Family) -> Result<bool, HostError> {
        for (table, chain, target) in SIGNS {
            if !host::iptables_leads(family, table, chain, target).await? {
                self.applied[family as usize] = None;
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Removes our rules if there are any.
pub async fn remove(family: Family) -> Result<(), HostError> {
    if !host::iptables_leads(family, "nat", "KUBE-SERVICES", None).await? {
        return Ok(());
    }
    for jump in jumps() {
        host::iptables_remove(family, jump.table, jump.chain, &jump.rule).await?;
    }
    let mut script = String::new();
    for table in TABLES {
        script.extend(removal(table, &existing(family, table).await?));
    }
    host::iptables_restore(family, &script).await?;
    // A kubelet may lead to this chain, too; then it stays.
    let shared = format!("*filter\n-X {SHARED_CHAIN}\nCOMMIT\n");
    host::iptables_remove(family, "filter", SHARED_CHAIN, &FOREIGN_TO_LOOPBACK).await?;
    if let Err(error) = host::iptables_restore(family, &shared).await {
        tracing::debug!(%error, "the chain {SHARED_CHAIN} stays");
    }
    Ok(())
}

async fn existing(family: Family, table: &str) -> Result<Applied, HostError> {
    let chains = host::iptables_chains(family, table).await?;
    Ok(chains.into_iter().filter(|chain| is_ours(chain)).map(|chain| (chain, 0)).collect())
}
