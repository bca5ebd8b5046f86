package main

// A row is one line of the table.
type row struct {
	name string
	unit string
	// alone rows are no ratio to the direct leg: it has no proxies, or its
	// own value is already taken off.
	alone bool
}

// The names of legs that others are compared with, or that have goals.
const (
	legDirect   = "direct"
	legRedirect = "kernel-redirect"
	legPlain    = "ztun-plain"
	legHBONE    = "ztun-hbone"
	legSameNode = "ztun-same-node"
	// Of any other proxy.
	legOther         = "other"
	legOtherSameNode = "other-same-node"
)

// rivals are the legs of the other proxy that legs are compared with.
var rivals = map[string]string{
	legPlain:    legOther,
	legHBONE:    legOther,
	legSameNode: legOtherSameNode,
}
