//! Gives a volume's files to the pod's group, for drivers that do not do so themselves.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::Path;

const READ_WRITE: u32 = 0o660;
/// Directories are entered, and new files in them are the group's.
const DIRECTORY: u32 = 0o2110;

/// Gives `root` and everything in it to `group`. With `only_on_mismatch` nothing is looked at when the root is right.
/// Files that cannot be changed are counted, never a reason to stop; upstream does the same.
pub fn give(root: &Path, group: u32, only_on_mismatch: bool) -> io::Result<()> {
    if only_on_mismatch && is_right(&fs::metadata(root)?, group) {
        return Ok(());
    }
    let (mut failed, mut left) = (0usize, vec![root.to_owned()]);
    while let Some(path) = left.pop() {
        let metadata = fs::symlink_metadata(&path);
        if metadata.as_ref().is_ok_and(fs::Metadata::is_dir) {
            match fs::read_dir(&path) {
                Ok(entries) => left.extend(entries.flatten().map(|entry| entry.path())),
                Err(_) => failed += 1,
            }
        }
        if path != root && give_one(&path, group).is_err() {
            failed += 1;
        }
    }
    // The root last: its being right tells that all of it is.
    give_one(root, group)?;
    if failed > 0 {
        tracing::warn!(path = %root.display(), failed, "cannot give all files of a volume to the pod's group");
    }
    Ok(())
}

fn is_right(root: &fs::Metadata, group: u32) -> bool {
    let wanted = READ_WRITE | DIRECTORY;
    root.gid() == group && root.is_dir() && root.mode() & wanted == wanted
}

fn give_one(path: &Path, group: u32) -> io::Result<()> {
    lchown(path, None, Some(group))?;
    let metadata = fs::symlink_metadata(path)?;
    if metadata.is_symlink() {
        // Its mode means nothing, and changing it would change that of the file that it points to.
        return Ok(());
    }
    let more = if metadata.is_dir() { READ_WRITE | DIRECTORY } else { READ_WRITE };
    let mode = metadata.mode() & 0o7777;
    if mode & more == more {
        return Ok(());
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode | more))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_become_the_groups() {
        let root = tempfile::tempdir().unwrap();
        let (directory, file) = (root.path().join("d"), root.path().join("d/f"));
        fs::create_dir(&directory).unwrap();
        fs::write(&file, "x").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o400)).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", directory.join("link")).unwrap();
        let passwd = fs::metadata("/etc/passwd").unwrap().mode();
        // The own group, so that the test needs no privileges.
        let group = fs::metadata(&file).unwrap().gid();
        give(root.path(), group, false).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o660);
        assert_eq!(fs::metadata(&directory).unwrap().mode() & 0o2770, 0o2770);
        assert_eq!(fs::metadata("/etc/passwd").unwrap().mode(), passwd);

        // The root is right, so that nothing below is looked at.
        fs::set_permissions(&file, fs::Permissions::from_mode(0o400)).unwrap();
        give(root.path(), group, true).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o400);
    }
}
