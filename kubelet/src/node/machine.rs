//! What the machine is: processors, memory, disk, identity. Read from the kernel's files when asked; a file that is
//! missing gives an empty text or zero, because a node is of use without it.

use std::fs;
use std::path::Path;

use nix::sys::statvfs::statvfs;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    pub cpus: i64,
    pub memory: i64,
    pub swap: i64,
    pub disk: i64,
    pub machine_id: String,
    pub system_uuid: String,
    pub boot_id: String,
    pub kernel_version: String,
    pub os_image: String,
}

fn text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

impl Machine {
    /// `root_dir` is on the disk whose size counts as the node's ephemeral storage.
    pub fn read(root_dir: &Path) -> Self {
        let meminfo = text("/proc/meminfo");
        let disk =
            statvfs(root_dir).map_or(0, |disk| to_i64(disk.blocks()).saturating_mul(to_i64(disk.fragment_size())));
        let machine_id =
            ["/etc/machine-id", "/var/lib/dbus/machine-id"].map(text).into_iter().find(|id| !id.is_empty());
        let machine_id = machine_id.unwrap_or_default();
        let uuid = Some(text("/sys/class/dmi/id/product_uuid")).filter(|uuid| !uuid.is_empty());
        Self {
            cpus: online_cpus(&text("/sys/devices/system/cpu/online")),
            memory: meminfo_bytes(&meminfo, "MemTotal"),
            swap: meminfo_bytes(&meminfo, "SwapTotal"),
            disk,
            system_uuid: uuid.unwrap_or_else(|| machine_id.clone()),
            machine_id,
            boot_id: text("/proc/sys/kernel/random/boot_id"),
            kernel_version: text("/proc/sys/kernel/osrelease"),
            os_image: os_image(&text("/etc/os-release")),
        }
    }
}

fn to_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The kernel's list notation, `0-3,5`; at least one.
fn online_cpus(list: &str) -> i64 {
    let count = |range: &str| match range.split_once('-') {
        Some((first, last)) => Some(last.parse::<i64>().ok()? - first.parse::<i64>().ok()? + 1),
        None => range.parse::<i64>().ok().map(|_| 1),
    };
    list.split(',').filter_map(count).sum::<i64>().max(1)
}

/// A line of `/proc/meminfo` in bytes.
fn meminfo_bytes(meminfo: &str, name: &str) -> i64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<i64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// Memory that can be given out without swapping, in bytes.
pub fn available_memory() -> i64 {
    meminfo_bytes(&text("/proc/meminfo"), "MemAvailable")
}

fn os_image(os_release: &str) -> String {
    let pretty = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    pretty.map_or_else(|| "Linux".to_owned(), |name| name.trim_matches('"').to_owned())
}

/// The architecture as the API names it.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_texts() {
        assert_eq!(online_cpus("0-3,5\n".trim()), 5);
        assert_eq!(online_cpus(""), 1);
        assert_eq!(meminfo_bytes("MemTotal:       2048 kB\nMemFree: 1 kB", "MemTotal"), 2 << 20);
        assert_eq!(os_image("ID=debian\nPRETTY_NAME=\"Debian GNU/Linux 12\"\n"), "Debian GNU/Linux 12");
    }
}
