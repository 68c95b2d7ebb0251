//! docs/coverage.md, made from the tables that serve the calls, so that it cannot promise what is not there.

use crate::root;
use iommufd::table::{Entry, Rule};
use iommufd::uapi::{Field, Show, io};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

pub(crate) fn main(check: bool) -> Result<(), String> {
    let path = root().join("docs/coverage.md");
    let text = page(&root())?;
    if !check {
        return fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()));
    }
    let now = fs::read_to_string(&path).unwrap_or_default();
    if now == text { Ok(()) } else { Err(format!("{} is not up to date; run `cargo xtask coverage`", path.display())) }
}

fn page(root: &Path) -> Result<String, String> {
    let kernel: Vec<Entry> = iommufd::TABLE.iter().map(Entry::of).collect();
    let (ours, kernel): (Vec<_>, Vec<_>) = kernel.into_iter().partition(|entry| entry.name.starts_with("LOCKSTEP_"));
    let (container, kernel): (Vec<_>, Vec<_>) = kernel.into_iter().partition(|entry| entry.name.starts_with("VFIO_"));
    let devices: Vec<Entry> = vfio::TABLE.iter().map(Entry::of).collect();
    let tests = Tests::read(root)?;
    let mut text = "# What is served\n\n\
        Written by `cargo xtask coverage` from the tables that serve the calls; `cargo xtask coverage --check` fails when it is out of date.\n\n\
        *Bytes* are the smallest structure that is accepted and the whole one that is known. *Flags* are the bits and values that are known by name; others are refused. \
        *Tests* are files under `tests/` of the crate that make the call; the bold one is its own. Every call on /dev/iommu is also made by `tests/fail_nth.rs`, with each of its steps failing, \
        and by the random streams of `tests/streams.rs` and `fuzz/`. What differs from the kernel on purpose is in [differences.md](differences.md).\n"
        .to_owned();
    section(&mut text, "/dev/iommu", "As in linux/iommufd.h of Linux 7.3.", &kernel, &tests.iommufd);
    section(
        &mut text,
        "/dev/iommu as a VFIO container",
        "As in linux/vfio.h: what programs older than iommufd use.",
        &container,
        &tests.iommufd,
    );
    section(&mut text, "/dev/iommu, beyond the kernel", "Ours: [ioctls.md](ioctls.md).", &ours, &tests.iommufd);
    section(&mut text, "/dev/vfio/devices/vfioN", "As in linux/vfio.h.", &devices, &tests.vfio);
    let all = [kernel, container, ours, devices].concat();
    let _ = writeln!(text, "\n{} ioctls.", all.len());
    Ok(text)
}

fn section(text: &mut String, title: &str, words: &str, entries: &[Entry], tests: &BTreeMap<String, String>) {
    let _ = write!(
        text,
        "\n## {title}\n\n{words}\n\n| ioctl | number | structure | bytes | flags and values | tests |\n|---|---|---|---|---|---|\n"
    );
    for entry in entries {
        let bytes = match entry.rule {
            Rule::None => "a number".to_owned(),
            _ if entry.min == entry.size => entry.size.to_string(),
            _ => format!("{}–{}", entry.min, entry.size),
        };
        let structure = if entry.structure.is_empty() { String::new() } else { format!("`{}`", entry.structure) };
        let _ = writeln!(
            text,
            "| `{}` | {:#06x} | {structure} | {bytes} | {} | {} |",
            entry.name,
            io(entry.nr),
            flags(entry.fields),
            tests_of(entry, tests)
        );
    }
}

/// Names of a structure's bits and values.
fn flags(fields: &[Field]) -> String {
    let named = fields.iter().filter_map(|field| match field.show {
        Show::Flags(names) | Show::Enum(names) => {
            let names: Vec<_> = names.iter().map(|(_, name)| *name).collect();
            Some(format!("{}: {}", field.name, names.join(" ")))
        }
        _ => None,
    });
    named.collect::<Vec<_>>().join("; ")
}

/// What names begin with and files and structures leave out.
const FAMILIES: [&str; 5] = ["VFIO_DEVICE_", "VFIO_IOMMU_TYPE1_", "VFIO_", "IOMMU_", "LOCKSTEP_"];

/// Names without what the whole family begins with, as files are called.
fn short(name: &str) -> String {
    let rest = ["VFIO_DEVICE_", "IOMMU_", "LOCKSTEP_"].iter().find_map(|family| name.strip_prefix(family)).unwrap_or(name);
    rest.to_ascii_lowercase()
}

/// How many files are named where many make the call.
const MOST_NAMED: usize = 4;

fn tests_of(entry: &Entry, tests: &BTreeMap<String, String>) -> String {
    let own = short(entry.name);
    let (mut names, others): (Vec<_>, Vec<_>) = tests
        .iter()
        .filter(|(file, text)| **file == own || mentions(text, entry))
        .map(|(file, _)| file.clone())
        .partition(|file| *file == own);
    names.iter_mut().for_each(|name| *name = format!("**{name}**"));
    let room = MOST_NAMED - names.len();
    names.extend(others.iter().take(room).cloned());
    if others.len() > room {
        names.push(format!("and {} more", others.len() - room));
    }
    if names.is_empty() { "**none**".to_owned() } else { names.join(", ") }
}

/// Whether a test makes the call: it names the ioctl, with or without its family, its number, or its structure.
fn mentions(text: &str, entry: &Entry) -> bool {
    let mut words = text.split(|letter: char| !letter.is_alphanumeric() && letter != '_');
    let number = format!("{:#04x}", entry.nr);
    let names = FAMILIES.iter().filter_map(|family| entry.name.strip_prefix(family));
    let structures = FAMILIES.iter().filter_map(|family| entry.structure.strip_prefix(&family.to_ascii_lowercase())).map(rust_name);
    let (names, structures): (Vec<_>, Vec<_>) = (names.collect(), structures.collect());
    words.any(|word| word == entry.name || word == number || names.contains(&word) || structures.iter().any(|own| own == word))
}

/// What a structure is called in Rust, its family taken off: `ioas_map` is `IoasMap`.
fn rust_name(structure: &str) -> String {
    let capital = |word: &str| word[..1].to_ascii_uppercase() + &word[1..];
    structure.split('_').filter(|word| !word.is_empty()).map(capital).collect()
}

/// The text of every test file, by name.
struct Tests {
    iommufd: BTreeMap<String, String>,
    vfio: BTreeMap<String, String>,
}

/// Those that go through the whole table, or through none of it.
const GENERAL: [&str; 6] = ["fail_nth", "streams", "header", "local", "watch", "common"];

impl Tests {
    fn read(root: &Path) -> Result<Self, String> {
        let folder = |name: &str| {
            let (mut list, mut helpers) = (BTreeMap::new(), BTreeMap::new());
            collect(&root.join("crates").join(name).join("tests"), &mut list, &mut helpers)?;
            list.values_mut().for_each(|text| expand(text, &helpers));
            Ok::<_, String>(list)
        };
        Ok(Self { iommufd: folder("iommufd")?, vfio: folder("vfio")? })
    }
}

/// What tests call the client that the shared functions belong to.
const CLIENTS: [&str; 8] = ["client", "program", "desk", "guest", "own", "self", "other", "child"];

/// Adds the text of the shared functions that a test uses, and of those that they use.
fn expand(text: &mut String, helpers: &BTreeMap<String, String>) {
    let mut rest: Vec<&String> = helpers.keys().collect();
    loop {
        let uses = |name: &&&String| CLIENTS.iter().any(|who| text.contains(&format!("{who}.{name}(")));
        let (used, unused): (Vec<_>, Vec<_>) = rest.iter().partition(uses);
        if used.is_empty() {
            return;
        }
        used.iter().for_each(|name| text.push_str(&helpers[*name]));
        rest = unused;
    }
}

fn collect(folder: &Path, list: &mut BTreeMap<String, String>, helpers: &mut BTreeMap<String, String>) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path: PathBuf = entry.map_err(failed)?.path();
        let name = path.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if GENERAL.contains(&name.as_str()) {
            continue;
        }
        if path.is_dir() {
            collect(&path, list, helpers)?;
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            let text = fs::read_to_string(&path).map_err(failed)?;
            if text.contains("#[test]") {
                list.insert(name, text);
            } else {
                let functions = text.split("fn ").skip(1);
                helpers.extend(functions.filter_map(|body| Some((body.split(['(', '<']).next()?.to_owned(), body.to_owned()))));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_found_in_tests() {
        let entry = iommufd::TABLE.iter().find(|entry| entry.name == "IOMMU_IOAS_MAP").map(Entry::of).unwrap();
        for text in ["uapi::IoasMap { size", "io(0x85)", "// IOMMU_IOAS_MAP takes", "call(IOAS_MAP, arg)"] {
            assert!(mentions(text, &entry), "{text}");
        }
        assert!(!mentions("IoasMapFile { } io(0x8f) IOMMU_IOAS_MAP_FILE", &entry));
        let tests = [("ioas_map".to_owned(), String::new()), ("copy".to_owned(), "IoasMap {".to_owned())].into();
        assert_eq!(tests_of(&entry, &tests), "**ioas_map**, copy");
        let helpers =
            [("map".to_owned(), "map() { self.call(1) }".to_owned()), ("call".to_owned(), "call() { io(0x85) }".to_owned())].into();
        let (mut direct, mut none) = ("client.map(1)".to_owned(), "option.map(1)".to_owned());
        expand(&mut direct, &helpers);
        expand(&mut none, &helpers);
        assert!(mentions(&direct, &entry) && !mentions(&none, &entry));
    }
}
