//! Our structures and numbers against the C headers themselves: a small program is compiled that prints what the compiler makes of them.
//!
//! include/lockstep.h is ours. linux/iommufd.h is taken from `LOCKSTEP_IOMMUFD_H`, from ../shared/uapi beside the workspace, or from the system; linux/vfio.h from the system. Neither
//! is part of this project. Without a compiler or a header the test says so and passes; structures and fields that a header is too
//! old for are named.

use iommufd::TABLE;
use iommufd::uapi::{self, Structure, io};
use lockstep_iommufd as iommufd;
use std::collections::HashMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A header, and what of it our names stand for.
struct Header {
    path: PathBuf,
    text: String,
}

impl Header {
    fn read(path: impl Into<PathBuf>) -> Option<Self> {
        let path = path.into();
        let text = std::fs::read_to_string(&path).ok()?;
        Some(Self { path, text })
    }

    /// What stands between the braces of a structure.
    fn body(&self, structure: &str) -> Option<&str> {
        let (_, rest) = self.text.split_once(&format!("struct {structure} {{"))?;
        // A structure in the structure ends with a tab before the brace.
        rest.split("\n}").next()
    }

    fn defines(&self, name: &str) -> bool {
        let ends = |rest: &str| rest.starts_with([' ', '\t', '(']);
        self.text.match_indices(&format!("#define {name}")).any(|(at, found)| ends(&self.text[at + found.len()..]))
    }
}

fn iommufd_header() -> Option<Header> {
    if let Some(path) = std::env::var_os("LOCKSTEP_IOMMUFD_H") {
        return Some(Header::read(&path).unwrap_or_else(|| panic!("LOCKSTEP_IOMMUFD_H names {path:?}, which cannot be read")));
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let beside = Header::read(workspace.join("../shared/uapi/linux/iommufd.h"));
    beside.or_else(|| Header::read("/usr/include/linux/iommufd.h"))
}

/// Fields that C reaches through another one, and the one that a union has two names for.
fn c_expression(structure: &str, field: &str) -> String {
    let in_header = matches!(structure, "vfio_iommu_type1_info_dma_avail" | "vfio_iommu_type1_info_cap_iova_range");
    if in_header && matches!(field, "id" | "version" | "next") { format!("header.{field}") } else { field.to_owned() }
}

fn has_word(text: &str, word: &str) -> bool {
    text.split(|letter: char| !letter.is_alphanumeric() && letter != '_').any(|own| own == word)
}

/// Checks everything of ours whose name begins with one of these against a header; answers how many figures were compared.
fn check(header: &Header, structures: &[&Structure], ioctls: &[(&str, u32)], constants: &[(&str, u64)]) -> usize {
    let mut wanted: HashMap<String, u64> = HashMap::new();
    let mut lines = String::new();
    let mut missing = Vec::new();
    let mut print = |key: String, c: &str, ours: u64| {
        let _ = writeln!(lines, "\tprintf(\"{key} %llu\\n\", (unsigned long long)({c}));");
        wanted.insert(key, ours);
    };
    for structure in structures {
        let name = structure.name;
        let Some(body) = header.body(name) else {
            missing.push(format!("struct {name}"));
            continue;
        };
        print(format!("sizeof {name}"), &format!("sizeof(struct {name})"), structure.size as u64);
        for field in structure.fields {
            let c = c_expression(name, field.name);
            if c == field.name && !has_word(body, field.name) {
                missing.push(format!("{name}.{}", field.name));
                continue;
            }
            print(format!("offset {name}.{}", field.name), &format!("offsetof(struct {name}, {c})"), field.offset as u64);
            print(format!("size {name}.{}", field.name), &format!("sizeof(((struct {name} *)0)->{c})"), field.size as u64);
        }
    }
    let numbers = ioctls.iter().map(|(name, command)| (*name, u64::from(*command))).chain(constants.iter().copied());
    for (name, ours) in numbers {
        // Constants may be members of enums.
        if header.defines(name) || has_word(&header.text, name) {
            print(format!("value {name}"), name, ours);
        } else {
            missing.push(name.to_owned());
        }
    }
    if !missing.is_empty() {
        eprintln!("{} is too old for: {}", header.path.display(), missing.join(", "));
    }
    let Some(output) = run(header, &lines) else { return 0 };
    let mut wrong = String::new();
    for line in output.lines() {
        let (key, value) = line.rsplit_once(' ').unwrap();
        let ours = wanted.remove(key).unwrap();
        if value.parse() != Ok(ours) {
            let _ = writeln!(wrong, "{key}: C says {value}, we say {ours}");
        }
    }
    assert!(wrong.is_empty(), "{} differs:\n{wrong}", header.path.display());
    assert!(wanted.is_empty(), "not printed: {wanted:?}");
    output.lines().count()
}

/// Compiles and runs a program that prints; `None` without a compiler.
fn run(header: &Header, lines: &str) -> Option<String> {
    let folder = std::env::temp_dir().join(format!("lockstep-header-{}-{}", std::process::id(), lines.len()));
    std::fs::create_dir_all(&folder).unwrap();
    let (source, program) = (folder.join("print.c"), folder.join("print"));
    let path = std::fs::canonicalize(&header.path).unwrap();
    let text = format!(
        "#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n#include {:?}\nint main(void)\n{{\n{lines}\treturn 0;\n}}\n",
        path
    );
    std::fs::write(&source, text).unwrap();
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let compiled = Command::new(&compiler).arg("-o").arg(&program).arg(&source).output();
    let output = match compiled {
        Err(error) => {
            eprintln!("headers are not compared: {compiler}: {error}");
            None
        }
        Ok(compiled) => {
            assert!(compiled.status.success(), "{compiler}: {}", String::from_utf8_lossy(&compiled.stderr));
            let output = Command::new(&program).output().unwrap();
            Some(String::from_utf8(output.stdout).unwrap())
        }
    };
    std::fs::remove_dir_all(&folder).unwrap();
    output
}

fn ioctls(prefix: &str) -> Vec<(&'static str, u32)> {
    let own = TABLE.iter().filter(|entry| entry.name.starts_with(prefix) && entry.name != "IOMMU_TEST_CMD");
    own.map(|entry| (entry.name, io(entry.nr))).collect()
}

#[test]
fn iommufd_is_as_in_c() {
    let Some(header) = iommufd_header() else {
        eprintln!("structures are not compared: no linux/iommufd.h; LOCKSTEP_IOMMUFD_H can name one");
        return;
    };
    let structures: Vec<_> = uapi::kernel::STRUCTURES.iter().collect();
    let constants = [
        ("IOMMU_IOAS_MAP_FIXED_IOVA", u64::from(uapi::MAP_FIXED_IOVA)),
        ("IOMMU_IOAS_MAP_WRITEABLE", u64::from(uapi::MAP_WRITEABLE)),
        ("IOMMU_IOAS_MAP_READABLE", u64::from(uapi::MAP_READABLE)),
        ("IOMMU_HWPT_ALLOC_NEST_PARENT", u64::from(uapi::HWPT_NEST_PARENT)),
        ("IOMMU_HWPT_ALLOC_DIRTY_TRACKING", u64::from(uapi::HWPT_DIRTY_TRACKING)),
        ("IOMMU_HWPT_FAULT_ID_VALID", u64::from(uapi::HWPT_FAULT_ID_VALID)),
        ("IOMMU_HWPT_ALLOC_PASID", u64::from(uapi::HWPT_PASID)),
        ("IOMMU_OPTION_RLIMIT_MODE", u64::from(uapi::OPTION_RLIMIT_MODE)),
        ("IOMMU_OPTION_HUGE_PAGES", u64::from(uapi::OPTION_HUGE_PAGES)),
        ("IOMMU_OPTION_OP_SET", u64::from(uapi::OPTION_SET)),
        ("IOMMU_OPTION_OP_GET", u64::from(uapi::OPTION_GET)),
        ("IOMMU_VFIO_IOAS_GET", u64::from(uapi::VFIO_IOAS_GET)),
        ("IOMMU_VFIO_IOAS_SET", u64::from(uapi::VFIO_IOAS_SET)),
        ("IOMMU_VFIO_IOAS_CLEAR", u64::from(uapi::VFIO_IOAS_CLEAR)),
        ("IOMMU_HW_INFO_FLAG_INPUT_TYPE", u64::from(uapi::HW_INFO_INPUT_TYPE)),
        ("IOMMU_HW_CAP_DIRTY_TRACKING", uapi::HW_CAP_DIRTY_TRACKING),
        ("IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED", uapi::HW_CAP_ATS_NOT_SUPPORTED),
        ("IOMMU_HWPT_DIRTY_TRACKING_ENABLE", u64::from(uapi::DIRTY_TRACKING_ENABLE)),
        ("IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR", u64::from(uapi::DIRTY_NO_CLEAR)),
        ("IOMMU_PGFAULT_FLAGS_PASID_VALID", u64::from(uapi::PGFAULT_PASID_VALID)),
        ("IOMMU_PGFAULT_FLAGS_LAST_PAGE", u64::from(uapi::PGFAULT_LAST_PAGE)),
        ("IOMMUFD_PAGE_RESP_SUCCESS", u64::from(uapi::PAGE_RESP_SUCCESS)),
        ("IOMMUFD_PAGE_RESP_INVALID", u64::from(uapi::PAGE_RESP_INVALID)),
        ("IOMMU_VEVENTQ_FLAG_LOST_EVENTS", u64::from(uapi::VEVENTQ_LOST_EVENTS)),
    ];
    let compared = check(&header, &structures, &ioctls("IOMMU_"), &constants);
    eprintln!("{compared} figures agree with {}", header.path.display());
}

#[test]
fn the_vfio_container_is_as_in_c() {
    let Some(header) = Header::read("/usr/include/linux/vfio.h") else {
        eprintln!("structures are not compared: no linux/vfio.h");
        return;
    };
    let structures: Vec<_> = uapi::vfio::STRUCTURES.iter().collect();
    let constants = [
        ("VFIO_TYPE1_IOMMU", uapi::vfio::TYPE1_IOMMU),
        ("VFIO_TYPE1v2_IOMMU", uapi::vfio::TYPE1V2_IOMMU),
        ("VFIO_DMA_CC_IOMMU", uapi::vfio::DMA_CC_IOMMU),
        ("VFIO_NOIOMMU_IOMMU", uapi::vfio::NOIOMMU_IOMMU),
        ("VFIO_UNMAP_ALL", uapi::vfio::UNMAP_ALL),
        ("VFIO_IOMMU_INFO_PGSIZES", u64::from(uapi::vfio::INFO_PGSIZES)),
        ("VFIO_IOMMU_INFO_CAPS", u64::from(uapi::vfio::INFO_CAPS)),
        ("VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE", u64::from(uapi::vfio::CAP_IOVA_RANGE)),
        ("VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL", u64::from(uapi::vfio::CAP_DMA_AVAIL)),
        ("VFIO_DMA_MAP_FLAG_READ", u64::from(uapi::vfio::DMA_MAP_READ)),
        ("VFIO_DMA_MAP_FLAG_WRITE", u64::from(uapi::vfio::DMA_MAP_WRITE)),
        ("VFIO_DMA_UNMAP_FLAG_ALL", u64::from(uapi::vfio::DMA_UNMAP_ALL)),
    ];
    let compared = check(&header, &structures, &ioctls("VFIO_"), &constants);
    eprintln!("{compared} figures agree with {}", header.path.display());
}

/// The header that C programs are given for what the kernel lacks.
#[test]
fn our_own_header_is_right() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../include/lockstep.h");
    let header = Header::read(&path).unwrap_or_else(|| panic!("{} is missing", path.display()));
    let structures: Vec<_> = uapi::ours::STRUCTURES.iter().collect();
    for structure in &structures {
        assert!(header.body(structure.name).is_some(), "include/lockstep.h lacks struct {}", structure.name);
    }
    for (name, _) in ioctls("LOCKSTEP_") {
        assert!(header.defines(name), "include/lockstep.h lacks {name}");
    }
    check(&header, &structures, &ioctls("LOCKSTEP_"), &[]);
}

/// Every structure that an entry of the table takes is one that is compared, and says its own size.
#[test]
fn the_table_knows_its_structures() {
    for entry in TABLE.iter().filter(|entry| !entry.structure.is_empty()) {
        let known = uapi::structures().find(|known| known.name == entry.structure);
        let known = known.unwrap_or_else(|| panic!("{} takes {}, which is in no list", entry.name, entry.structure));
        assert_eq!(known.size, entry.size, "{}", entry.name);
        assert!(entry.min <= entry.size && entry.min.is_multiple_of(4), "{}", entry.name);
        let ends = known.fields.iter().map(|field| field.offset + field.size);
        // Words of the test operations have no types of their own.
        let ends_a_field = entry.name == "IOMMU_TEST_CMD" || ends.clone().any(|end| end == entry.min);
        assert!(ends_a_field && ends.max() == Some(entry.size), "{}: {} bytes end no field", entry.name, entry.min);
    }
}
