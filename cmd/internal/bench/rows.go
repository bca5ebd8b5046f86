package main

// A row is one line of the table.
type row struct {
	name string
	unit string
	// alone rows are no ratio to the direct leg: it has no proxies, or its
	// own value is already taken off.
	alone bool
}

// The names of legs that others are compared with, or that have floors.
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

// A floor is the least ratio to the direct leg that is asked for.
type floor struct {
	leg, row string
	ratio    float64
}

// floors are those of this stage of the project.
var floors = []floor{
	{legHBONE, "stream-1-up", 0.18},
	{legHBONE, "stream-1-down", 0.18},
	{legHBONE, "rps-8", 0.18},
	{legHBONE, "rps-64", 0.30},
	{legHBONE, "new-conns", 0.18},
	{legPlain, "stream-1-up", 0.35},
	{legPlain, "stream-1-down", 0.35},
}
