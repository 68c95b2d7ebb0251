//! Error numbers by name: programs print numbers, people think in names.

use rustix::io::Errno;

/// Linux's errors on x86 and Arm, in order from 1 (errno.h). Two numbers are not used, and two names stand for EAGAIN's and EDEADLK's numbers.
const NAMES: [&str; 133] = [
    "EPERM",
    "ENOENT",
    "ESRCH",
    "EINTR",
    "EIO",
    "ENXIO",
    "E2BIG",
    "ENOEXEC",
    "EBADF",
    "ECHILD",
    "EAGAIN",
    "ENOMEM",
    "EACCES",
    "EFAULT",
    "ENOTBLK",
    "EBUSY",
    "EEXIST",
    "EXDEV",
    "ENODEV",
    "ENOTDIR",
    "EISDIR",
    "EINVAL",
    "ENFILE",
    "EMFILE",
    "ENOTTY",
    "ETXTBSY",
    "EFBIG",
    "ENOSPC",
    "ESPIPE",
    "EROFS",
    "EMLINK",
    "EPIPE",
    "EDOM",
    "ERANGE",
    "EDEADLK",
    "ENAMETOOLONG",
    "ENOLCK",
    "ENOSYS",
    "ENOTEMPTY",
    "ELOOP",
    "",
    "ENOMSG",
    "EIDRM",
    "ECHRNG",
    "EL2NSYNC",
    "EL3HLT",
    "EL3RST",
    "ELNRNG",
    "EUNATCH",
    "ENOCSI",
    "EL2HLT",
    "EBADE",
    "EBADR",
    "EXFULL",
    "ENOANO",
    "EBADRQC",
    "EBADSLT",
    "",
    "EBFONT",
    "ENOSTR",
    "ENODATA",
    "ETIME",
    "ENOSR",
    "ENONET",
    "ENOPKG",
    "EREMOTE",
    "ENOLINK",
    "EADV",
    "ESRMNT",
    "ECOMM",
    "EPROTO",
    "EMULTIHOP",
    "EDOTDOT",
    "EBADMSG",
    "EOVERFLOW",
    "ENOTUNIQ",
    "EBADFD",
    "EREMCHG",
    "ELIBACC",
    "ELIBBAD",
    "ELIBSCN",
    "ELIBMAX",
    "ELIBEXEC",
    "EILSEQ",
    "ERESTART",
    "ESTRPIPE",
    "EUSERS",
    "ENOTSOCK",
    "EDESTADDRREQ",
    "EMSGSIZE",
    "EPROTOTYPE",
    "ENOPROTOOPT",
    "EPROTONOSUPPORT",
    "ESOCKTNOSUPPORT",
    "EOPNOTSUPP",
    "EPFNOSUPPORT",
    "EAFNOSUPPORT",
    "EADDRINUSE",
    "EADDRNOTAVAIL",
    "ENETDOWN",
    "ENETUNREACH",
    "ENETRESET",
    "ECONNABORTED",
    "ECONNRESET",
    "ENOBUFS",
    "EISCONN",
    "ENOTCONN",
    "ESHUTDOWN",
    "ETOOMANYREFS",
    "ETIMEDOUT",
    "ECONNREFUSED",
    "EHOSTDOWN",
    "EHOSTUNREACH",
    "EALREADY",
    "EINPROGRESS",
    "ESTALE",
    "EUCLEAN",
    "ENOTNAM",
    "ENAVAIL",
    "EISNAM",
    "EREMOTEIO",
    "EDQUOT",
    "ENOMEDIUM",
    "EMEDIUMTYPE",
    "ECANCELED",
    "ENOKEY",
    "EKEYEXPIRED",
    "EKEYREVOKED",
    "EKEYREJECTED",
    "EOWNERDEAD",
    "ENOTRECOVERABLE",
    "ERFKILL",
    "EHWPOISON",
];
const ALIASES: [(&str, &str); 3] = [("EWOULDBLOCK", "EAGAIN"), ("EDEADLOCK", "EDEADLK"), ("ENOTSUP", "EOPNOTSUPP")];

/// An error's name; its number when it has none.
pub fn errno_name(errno: Errno) -> String {
    let number = errno.raw_os_error();
    let name = usize::try_from(number).ok().and_then(|number| NAMES.get(number.checked_sub(1)?)).filter(|name| !name.is_empty());
    name.map_or_else(|| number.to_string(), |name| (*name).to_owned())
}

/// The error that a name, in any case, or a number stands for.
pub(super) fn parse(text: &str) -> Option<Errno> {
    let name = text.to_ascii_uppercase();
    let name = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name.as_str(), |(_, name)| *name);
    let known = NAMES.iter().position(|own| !own.is_empty() && *own == name).and_then(|at| i32::try_from(at + 1).ok());
    // What the kernel can return as an error.
    let number = known.or_else(|| text.parse().ok().filter(|number| (1..4096).contains(number)))?;
    Some(Errno::from_raw_os_error(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_agree_with_the_library() {
        let known = [
            (Errno::PERM, "EPERM"),
            (Errno::NOMEM, "ENOMEM"),
            (Errno::NOSPC, "ENOSPC"),
            (Errno::LOOP, "ELOOP"),
            (Errno::BADE, "EBADE"),
            (Errno::OVERFLOW, "EOVERFLOW"),
            (Errno::BADFD, "EBADFD"),
            (Errno::MSGSIZE, "EMSGSIZE"),
            (Errno::OPNOTSUPP, "EOPNOTSUPP"),
            (Errno::ADDRINUSE, "EADDRINUSE"),
            (Errno::STALE, "ESTALE"),
            (Errno::HWPOISON, "EHWPOISON"),
        ];
        for (errno, name) in known {
            assert_eq!((errno_name(errno).as_str(), parse(name)), (name, Some(errno)));
        }
        assert_eq!(parse("einval"), Some(Errno::INVAL));
        assert_eq!(parse("EWOULDBLOCK"), Some(Errno::AGAIN));
        assert_eq!(parse("12"), Some(Errno::NOMEM));
        for bad in ["", "0", "-12", "4096", "ENOSUCH", "41"] {
            assert_eq!(parse(bad).map(errno_name).filter(|_| bad != "41"), None, "{bad}");
        }
        assert_eq!(errno_name(Errno::from_raw_os_error(41)), "41");
    }
}
