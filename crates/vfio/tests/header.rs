//! The structures against the C header of this machine: sizes, offsets and numbers as a C compiler sees them.

use iommufd::uapi::{Struct, io};
use lockstep_vfio::uapi::*;
use std::fmt::Write as _;
use std::process::Command;

/// What the header of an older system lacks is left out by this.
fn guard(name: &str) -> &'static str {
    match name {
        "vfio_device_bind_iommufd" | "VFIO_DEVICE_BIND_IOMMUFD" => "VFIO_DEVICE_BIND_IOMMUFD",
        "vfio_device_attach_iommufd_pt" | "VFIO_DEVICE_ATTACH_IOMMUFD_PT" => "VFIO_DEVICE_ATTACH_PASID",
        "vfio_device_detach_iommufd_pt" | "VFIO_DEVICE_DETACH_IOMMUFD_PT" => "VFIO_DEVICE_DETACH_PASID",
        "token_uuid_ptr" => "VFIO_DEVICE_BIND_FLAG_TOKEN",
        _ => "VFIO_BASE",
    }
}

fn check<S: Struct>(program: &mut String) {
    let name = S::C_NAME;
    for field in S::FIELDS.iter().filter(|field| field.name != "pad") {
        let (guard, inner) = (guard(name), guard(field.name));
        writeln!(program, "#if defined({guard}) && defined({inner})").unwrap();
        writeln!(program, "_Static_assert(offsetof(struct {name}, {}) == {}, \"offset\");", field.name, field.offset).unwrap();
        writeln!(program, "_Static_assert(sizeof(((struct {name} *)0)->{}) == {}, \"size\");\n#endif", field.name, field.size).unwrap();
    }
}

#[test]
fn structures_and_numbers_are_those_of_the_header() {
    let mut program = String::from("#include <stddef.h>\n#include <linux/vfio.h>\n");
    check::<DeviceInfo>(&mut program);
    check::<RegionInfo>(&mut program);
    check::<IrqInfo>(&mut program);
    check::<IrqSet>(&mut program);
    check::<HotResetInfo>(&mut program);
    check::<HotReset>(&mut program);
    check::<Feature>(&mut program);
    check::<BindIommufd>(&mut program);
    check::<AttachPt>(&mut program);
    check::<DetachPt>(&mut program);
    let numbers = [
        ("VFIO_DEVICE_GET_INFO", io(GET_INFO)),
        ("VFIO_DEVICE_GET_REGION_INFO", io(GET_REGION_INFO)),
        ("VFIO_DEVICE_GET_IRQ_INFO", io(GET_IRQ_INFO)),
        ("VFIO_DEVICE_SET_IRQS", io(SET_IRQS)),
        ("VFIO_DEVICE_RESET", io(RESET)),
        ("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", io(GET_PCI_HOT_RESET_INFO)),
        ("VFIO_DEVICE_PCI_HOT_RESET", io(PCI_HOT_RESET)),
        ("VFIO_DEVICE_FEATURE", io(FEATURE)),
        ("VFIO_DEVICE_BIND_IOMMUFD", io(BIND_IOMMUFD)),
        ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", io(ATTACH_IOMMUFD_PT)),
        ("VFIO_DEVICE_DETACH_IOMMUFD_PT", io(DETACH_IOMMUFD_PT)),
        ("VFIO_DEVICE_FLAGS_RESET", DEVICE_RESET),
        ("VFIO_DEVICE_FLAGS_PCI", DEVICE_PCI),
        ("VFIO_REGION_INFO_FLAG_READ", REGION_READ),
        ("VFIO_REGION_INFO_FLAG_WRITE", REGION_WRITE),
        ("VFIO_REGION_INFO_FLAG_MMAP", REGION_MMAP),
        ("VFIO_IRQ_INFO_EVENTFD", IRQ_EVENTFD),
        ("VFIO_IRQ_INFO_MASKABLE", IRQ_MASKABLE),
        ("VFIO_IRQ_INFO_AUTOMASKED", IRQ_AUTOMASKED),
        ("VFIO_IRQ_INFO_NORESIZE", IRQ_NORESIZE),
        ("VFIO_IRQ_SET_DATA_NONE", SET_DATA_NONE),
        ("VFIO_IRQ_SET_DATA_BOOL", SET_DATA_BOOL),
        ("VFIO_IRQ_SET_DATA_EVENTFD", SET_DATA_EVENTFD),
        ("VFIO_IRQ_SET_ACTION_MASK", SET_MASK),
        ("VFIO_IRQ_SET_ACTION_UNMASK", SET_UNMASK),
        ("VFIO_IRQ_SET_ACTION_TRIGGER", SET_TRIGGER),
        ("VFIO_DEVICE_FEATURE_MASK", FEATURE_MASK),
        ("VFIO_DEVICE_FEATURE_GET", FEATURE_GET),
        ("VFIO_DEVICE_FEATURE_SET", FEATURE_SET),
        ("VFIO_DEVICE_FEATURE_PROBE", FEATURE_PROBE),
        ("VFIO_DEVICE_BIND_FLAG_TOKEN", BIND_TOKEN),
        ("VFIO_DEVICE_ATTACH_PASID", PT_PASID),
        ("VFIO_DEVICE_DETACH_PASID", PT_PASID),
    ];
    for (name, value) in numbers {
        writeln!(program, "#ifdef {name}\n_Static_assert(({name}) == {value}u, \"{name}\");\n#endif").unwrap();
    }
    let source = std::env::temp_dir().join(format!("lockstep-vfio-header-{}.c", std::process::id()));
    std::fs::write(&source, &program).unwrap();
    let compiled = Command::new("cc").args(["-fsyntax-only", "-x", "c"]).arg(&source).output();
    std::fs::remove_file(&source).unwrap();
    match compiled {
        Err(missing) => eprintln!("not compared with the C header: no C compiler ({missing})"),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            if text.contains("linux/vfio.h: No such file") {
                eprintln!("not compared with the C header: this machine has no linux/vfio.h");
            } else {
                assert!(output.status.success(), "{text}");
            }
        }
    }
}
