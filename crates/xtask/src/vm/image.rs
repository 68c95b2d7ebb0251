//! The machine's file system, as the kernel unpacks it: a cpio archive of the format "newc" (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::process::Command;

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_600;

#[derive(Debug, Default)]
pub(crate) struct Image(BTreeMap<String, Entry>);

#[derive(Debug, Default)]
struct Entry {
    mode: u32,
    device: (u32, u32),
    bytes: Vec<u8>,
}

impl Image {
    /// A file, and the folders that lead to it. The first of one name stays.
    pub(crate) fn file(&mut self, path: &str, permissions: u32, bytes: Vec<u8>) {
        self.add(path, Entry { mode: FILE | permissions, bytes, ..Entry::default() });
    }

    pub(crate) fn folder(&mut self, path: &str) {
        self.add(path, Entry { mode: FOLDER, ..Entry::default() });
    }

    /// Where the first process finds its standard streams.
    pub(crate) fn console(&mut self) {
        self.add("/dev/console", Entry { mode: CHARACTER_DEVICE, device: (5, 1), ..Entry::default() });
    }

    /// A program of this machine, with the shared objects that it needs where it needs them.
    pub(crate) fn program(&mut self, program: &Path, inside: &str) -> Result<(), String> {
        let read = |path: &Path| fs::read(path).map_err(|error| format!("{}: {error}", path.display()));
        self.file(inside, 0o755, read(program)?);
        // A static program has none, and ldd says so with a failure.
        let listed = Command::new("ldd").arg(program).output().map_err(|error| format!("ldd: {error}"))?;
        for object in objects(&String::from_utf8_lossy(&listed.stdout))? {
            self.file(&object, 0o755, read(Path::new(&object))?);
        }
        Ok(())
    }

    fn add(&mut self, path: &str, entry: Entry) {
        let path = path.trim_start_matches('/');
        for (end, _) in path.match_indices('/') {
            self.0.entry(path[..end].to_owned()).or_insert(Entry { mode: FOLDER, ..Entry::default() });
        }
        self.0.entry(path.to_owned()).or_insert(entry);
    }

    pub(crate) fn write(&self, to: &Path) -> io::Result<()> {
        let mut out = BufWriter::new(fs::File::create(to)?);
        // By name, so that folders come before what is in them.
        for (inode, (name, entry)) in self.0.iter().enumerate() {
            put(&mut out, inode + 1, name, entry)?;
        }
        put(&mut out, 0, "TRAILER!!!", &Entry::default())?;
        out.flush()
    }
}

/// One header, its name and its bytes, the latter two padded to four.
fn put(out: &mut impl Write, inode: usize, name: &str, entry: &Entry) -> io::Result<()> {
    let too_large = |_| io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is larger than 4 GiB"));
    let size = u32::try_from(entry.bytes.len()).map_err(too_large)?;
    let (major, minor) = entry.device;
    // Magic; inode, mode, owner, group, links, time, size, device (2), device of a device file (2), length of the name, checksum.
    let fields = [inode as u32, entry.mode, 0, 0, 1, 0, size, 0, 0, major, minor, name.len() as u32 + 1, 0];
    let mut header = String::from("070701");
    fields.iter().for_each(|field| header += &format!("{field:08x}"));
    header += name;
    header.push('\0');
    out.write_all(header.as_bytes())?;
    out.write_all(&[0; 3][..header.len().next_multiple_of(4) - header.len()])?;
    out.write_all(&entry.bytes)?;
    out.write_all(&[0; 3][..entry.bytes.len().next_multiple_of(4) - entry.bytes.len()])
}

/// The files in what ldd prints: `name => /path (0x...)`, `/path (0x...)`, and the kernel's own object without a path.
fn objects(listed: &str) -> Result<Vec<String>, String> {
    if let Some(missing) = listed.lines().find(|line| line.contains("not found")) {
        return Err(format!("a shared object is missing here: {}", missing.trim()));
    }
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(str::to_owned);
    Ok(listed.lines().filter_map(path).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_objects_are_read_from_what_ldd_prints() {
        let listed = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f1)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f2)\n";
        assert_eq!(objects(listed).unwrap(), ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        assert!(objects("\tlibodd.so => not found\n").is_err());
        assert_eq!(objects("\tnot a dynamic executable\n").unwrap(), [""; 0]);
    }

    #[test]
    fn entries_are_padded_and_folders_come_first() {
        let mut image = Image::default();
        image.file("/a/b/c", 0o644, b"hello".to_vec());
        assert_eq!(image.0.keys().collect::<Vec<_>>(), ["a", "a/b", "a/b/c"]);
        let mut out = Vec::new();
        put(&mut out, 7, "a/b/c", &image.0["a/b/c"]).unwrap();
        // Typed from the format: 110 bytes of header, "a/b/c\0" makes 116, which is a multiple of four; five bytes and three of padding.
        let header = "07070100000007000081a4";
        assert!(out.starts_with(header.as_bytes()), "{}", String::from_utf8_lossy(&out));
        assert_eq!(&out[54..62], b"00000005");
        assert_eq!(&out[94..102], b"00000006");
        assert_eq!(&out[110..], b"a/b/c\0hello\0\0\0");
    }
}
