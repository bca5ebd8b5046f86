// Package marks reads what Kubernetes objects say about the mesh in labels and
// annotations, and the selectors that the agent is configured with. It knows
// neither an API server nor a pod: texts and label maps go in.
//
// All functions are pure.
package marks

import (
	"slices"
	"strconv"
	"strings"

	"github.com/ztun/ztun/tun/podnet"
)

// Bool reads s as Istio does: what cannot be read is otherwise.
func Bool(s string, otherwise bool) bool {
	v, err := strconv.ParseBool(s)
	if err != nil {
		return otherwise
	}
	return v
}

// MaxInterfaces is how many virtual interfaces of a pod podnet takes.
const MaxInterfaces = 32

// Interfaces reads the comma list of istio.io/reroute-virtual-interfaces. It
// returns the names that interfaces can have, sorted, each once, at most
// MaxInterfaces, and one of the others, shortened for a log.
func Interfaces(list string) (names []string, wrong string) {
	for name := range strings.SplitSeq(list, ",") {
		if name = strings.TrimSpace(name); name == "" || slices.Contains(names, name) {
			continue
		}
		cfg := podnet.Config{VirtualInterfaces: []string{name}}
		if cfg.Validate() != nil || name == podnet.DefaultDevice || len(names) == MaxInterfaces {
			wrong = name[:min(len(name), maxInterfaceText)]
			continue
		}
		names = append(names, name)
	}
	slices.Sort(names)
	return names, wrong
}

// maxInterfaceText bounds how much of a wrong name is logged, in bytes.
const maxInterfaceText = 64
