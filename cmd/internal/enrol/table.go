package enrol

import (
	"errors"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/ztun/ztun/cmd/internal/agent"
)

// known is a pod that the agent was told of. The zero value is one that it was
// not.
type known struct {
	pod agent.Pod // As last set.
	// ns is open behind pod.Netns, where that is a descriptor of ours.
	ns *os.File
	// stale says that the agent must be told again, even the same: it was asked
	// to let go of the pod.
	stale bool
	// status is what the pod's status said when the plugin named the pod's
	// addresses: those of a sandbox that is no more.
	status []netip.Addr
	// serial is that of the last Set; 0: never.
	serial uint64
	// mark is what the pod was last annotated with, when the informer had it in this
	// version. While it still has, it does not know of the annotation.
	mark, version string
}

// addresses are the pod's, when its status says status. Those that the agent
// was told of stand while the status is behind, or names some of them.
func (k known) addresses(status []netip.Addr) []netip.Addr {
	told := k.pod.Addresses
	if len(told) == 0 {
		return status
	}
	behind := len(k.status) > 0 && slices.Equal(k.status, status)
	if behind || !slices.ContainsFunc(status, func(a netip.Addr) bool { return !slices.Contains(told, a) }) {
		return told
	}
	return status
}

// A table is what the agent was told last. Setting a pod and noting it are one
// step, so that of two who set a pod, the later one's word is in both places.
type table struct {
	agent Agent

	// mu guards the fields below. It is held while Agent.Set runs, which does
	// not wait.
	mu     sync.Mutex
	pods   map[string]*known // By UID.
	serial uint64
}

// errOvertaken says that somebody else set the pod meanwhile.
var errOvertaken = errors.New("enrol: the pod was enrolled otherwise meanwhile")

// anySerial sets a pod whoever was before.
const anySerial = ^uint64(0)

// get returns what the agent was told of the pod.
func (t *table) get(uid string) (known, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := t.pods[uid]
	if k == nil {
		return known{}, false
	}
	return *k, true
}

// named returns the UIDs of the pods with a name: several, if one was deleted
// and made again.
func (t *table) named(name types.NamespacedName) []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []string
	for uid, k := range t.pods {
		if k.pod.Namespace == name.Namespace && k.pod.Name == name.Name {
			out = append(out, uid)
		}
	}
	return out
}

// names returns the name of every pod.
func (t *table) names() []types.NamespacedName {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]types.NamespacedName, 0, len(t.pods))
	for _, k := range t.pods {
		out = append(out, types.NamespacedName{Namespace: k.pod.Namespace, Name: k.pod.Name})
	}
	return out
}

// adopt notes a pod that the agent knows from an earlier life.
func (t *table) adopt(p agent.Pod) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.serial++
	t.pods[p.UID] = &known{pod: p, serial: t.serial}
}

// set tells the agent of k.pod, unless it knows just that, or the pod was set
// since serial. The table owns k.ns.
func (t *table) set(k known, serial uint64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var before known
	if b := t.pods[k.pod.UID]; b != nil {
		before = *b
	}
	if serial != anySerial && before.serial != serial {
		if k.ns != before.ns {
			closeFile(k.ns)
		}
		return errOvertaken
	}
	if before.serial != 0 && !before.stale && reflect.DeepEqual(before.pod, k.pod) && before.ns == k.ns && slices.Equal(before.status, k.status) {
		return nil
	}
	if err := t.agent.Set(k.pod); err != nil {
		if k.ns != before.ns {
			closeFile(k.ns)
		}
		return &refusedError{err}
	}
	if before.ns != k.ns {
		closeFile(before.ns)
	}
	t.serial++
	k.serial, k.stale = t.serial, false
	k.mark, k.version = before.mark, before.version
	t.pods[k.pod.UID] = &k
	return nil
}

// marked says whether the pod was annotated with value since the informer heard of
// it: two writes for each of many pods wait for each other.
func (t *table) marked(pod *corev1.Pod, value string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := t.pods[string(pod.UID)]
	return k != nil && k.version != "" && k.version == pod.ResourceVersion && k.mark == value
}

func (t *table) setMarked(pod *corev1.Pod, value string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if k := t.pods[string(pod.UID)]; k != nil {
		k.mark, k.version = value, pod.ResourceVersion
	}
}

// spoil makes the next set one that is not left out. It returns the serial that
// drop wants.
func (t *table) spoil(uid string) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := t.pods[uid]
	if k == nil {
		return 0
	}
	k.stale = true
	return k.serial
}

// drop forgets the pod, unless it was set since serial.
func (t *table) drop(uid string, serial uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if k := t.pods[uid]; k != nil && k.serial == serial {
		closeFile(k.ns)
		delete(t.pods, uid)
	}
}

// close lets go of descriptors. The agent has its own by then, or never will.
func (t *table) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, k := range t.pods {
		closeFile(k.ns)
		k.ns = nil
	}
}

func closeFile(f *os.File) {
	if f != nil {
		_ = f.Close()
	}
}
