// Ztun-cni is the last plugin of the container runtime's chain. It asks the
// node agent about each new pod, and lets it start when the agent says so. It
// decides nothing, holds nothing and logs nothing: what goes wrong is its
// answer to the runtime, and stands in the pod's events.
//
// Without an answer the pod does not start: it would run without the mesh and
// nobody would know. Only the agent's own pods, and those of namespaces that
// are never in the mesh, do not ask.
package main

import (
	"fmt"
	"os"
	"runtime/debug"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

// release is set when a release is linked.
var release = "unknown"

func main() {
	nothing := func(*skel.CmdArgs) error { return nil }
	err := skel.PluginMainFuncsWithError(skel.CNIFuncs{
		Add: func(args *skel.CmdArgs) error { return guarded(args, os.Stdout) },
		// The agent learns of a pod's end from Kubernetes, and a pod that
		// cannot be deleted because the agent is away helps nobody.
		Del: nothing, Check: nothing, GC: nothing,
		// A node whose status fails takes no pod, and so not the agent's.
		Status: nothing,
	}, version.All, "CNI plugin ztun-cni "+release)
	if err != nil {
		if e := err.Print(); e != nil {
			fmt.Fprintln(os.Stderr, "ztun-cni:", e)
		}
		os.Exit(1)
	}
}

// guarded makes of a panic an answer that the runtime understands.
func guarded(args *skel.CmdArgs, out *os.File) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = types.NewError(types.ErrInternal, fmt.Sprintf("ztun-cni: panic: %v", v), string(debug.Stack()))
		}
	}()
	return add(args, out)
}
