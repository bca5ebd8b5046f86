// The functions of inline_linkname.go have no body: the compiler takes that
// only from a package with assembly.
