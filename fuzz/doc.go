// Package fuzz has the fuzz targets that need more than one package: random
// histories and hostile bytes against whole parts of ztun, each with an oracle
// that shares no code with what it judges. It holds tests only; a package's own
// parsers are fuzzed beside them.
//
//	target            what is fed                          who judges
//	FuzzWorld         histories of the control plane       a map and loops (model_test.go); a store told only the end
//	FuzzControlPlane  hostile delta ADS answers            the model, and what the NACK must say
//	FuzzHTTP2         frames and bytes in both roles       x/net's server and transport
//	FuzzPackets       packets into a pod's device          a list of what may leave; a connection afterwards
//	FuzzPeer          frames of a peer with a certificate  a naive policy; a neighbour's stream
//
// What runs beside a target moves the coverage of equal inputs, so that Go would
// spend a minute on making each interesting one smaller: bound it.
//
// An input is a script: bytes that are drawn as choices, so that any change of
// it is another script of the same kind, and its end is zeros (script_test.go).
// Where the parts keep time they run under testing/synctest; gVisor cannot, so
// the last two wait for what happens, never for time.
//
//	make fuzz
//	go test ./fuzz -run '^$' -fuzz FuzzWorld -fuzztime 3m -fuzzminimizetime 10x
package fuzz
