//! Where containers' logs lie, and clearing them away: directories of pods, links for log collectors.

use std::fs;
use std::path::{Path, PathBuf};

/// Where log collectors look for logs: `<pod>_<namespace>_<container>-<id>.log`.
pub const LINKS: &str = "/var/log/containers";

/// Directories of logs, named `<namespace>_<name>_<uid>`, whose uid is not known.
pub fn directories_without(parent: &str, known: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let is_unknown = |name: &str| {
        let parts: Vec<&str> = name.split('_').collect();
        matches!(parts.as_slice(), [_, _, uid] if !known(uid))
    };
    entries.filter(|entry| entry.file_name().to_str().is_some_and(is_unknown)).map(|entry| entry.path()).collect()
}

/// Removes links for log collectors to logs that are gone.
pub fn remove_dead_links() {
    for entry in fs::read_dir(LINKS).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_symlink() && !path.exists() {
            let _gone = fs::remove_file(path);
        }
    }
}

/// Removes a container's log and what rotation made of it.
pub fn remove(path: &str) {
    let path = Path::new(path);
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return;
    };
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(|file| file.starts_with(name)) {
            let _gone = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_pods_that_are_gone_are_found() {
        let parent = tempfile::tempdir().unwrap();
        for name in ["shop_web_1", "shop_web_2", "not-a-pods", "a_b"] {
            fs::create_dir(parent.path().join(name)).unwrap();
        }
        let found = directories_without(parent.path().to_str().unwrap(), |uid| uid == "1");
        assert_eq!(found, [parent.path().join("shop_web_2")]);
        assert!(directories_without("/nowhere", |_| false).is_empty());
    }
}
