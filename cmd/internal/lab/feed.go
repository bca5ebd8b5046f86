package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"sync"

	"github.com/ztun/ztun/cmd/internal/agent"
)

// A feed tells a node's attach side which pods are wanted, and hears how far
// they are. It outlives the process at its other end: each new one is told
// everything.
type feed struct {
	onServed func(uid string)

	mu sync.Mutex
	// mu guards the fields below.
	pods    map[string]agent.Pod
	states  map[string]agent.Status
	changed chan struct{} // Closed when pods or states change.
}

func newFeed(onServed func(uid string)) *feed {
	return &feed{onServed: onServed, pods: map[string]agent.Pod{}, states: map[string]agent.Status{}, changed: make(chan struct{})}
}

// set wants a pod attached as it says now.
func (f *feed) set(p agent.Pod) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pods[p.UID] = p
	f.wakeLocked()
}

// remove wants a pod detached, and waits until it is or ctx ends.
func (f *feed) remove(ctx context.Context, uid string) error {
	f.mu.Lock()
	delete(f.pods, uid)
	f.wakeLocked()
	f.mu.Unlock()
	for {
		f.mu.Lock()
		_, there := f.states[uid]
		changed := f.changed
		f.mu.Unlock()
		if !there {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("lab: detach %s: %w", uid, context.Cause(ctx))
		}
	}
}

// state returns what the attach side last said of a pod.
func (f *feed) state(uid string) (agent.Status, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s, ok := f.states[uid]
	return s, ok
}

func (f *feed) wakeLocked() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// connect gives cmd a standard input that tells it the pods, and a descriptor
// 3 that takes its states. The returned function starts the conversation; it
// must be called once cmd was started.
func (f *feed) connect(cmd *exec.Cmd) (start func(), err error) {
	stdin, tell, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	hear, states, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lab: %w", err), stdin.Close(), tell.Close())
	}
	cmd.Stdin = stdin
	cmd.ExtraFiles = []*os.File{states}
	return func() {
		stdin.Close()
		states.Close()
		gone := make(chan struct{})
		go f.tell(tell, gone)
		go func() {
			f.hear(hear)
			close(gone)
		}()
	}, nil
}

// tell writes the wanted pods to w, and again whenever they change.
func (f *feed) tell(w *os.File, gone <-chan struct{}) {
	defer w.Close()
	for {
		f.mu.Lock()
		pods := slices.SortedFunc(maps.Values(f.pods), func(a, b agent.Pod) int { return compareUID(a.UID, b.UID) })
		changed := f.changed
		f.mu.Unlock()
		if err := json.NewEncoder(w).Encode(pods); err != nil {
			return
		}
		select {
		case <-changed:
		case <-gone:
			return
		}
	}
}

// hear takes the states of all pods from r, each line replacing the last.
func (f *feed) hear(r *os.File) {
	defer r.Close()
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return
		}
		var states []agent.Status
		if err := json.Unmarshal(line, &states); err != nil {
			continue
		}
		f.mu.Lock()
		clear(f.states)
		var served []string
		for _, s := range states {
			f.states[s.Pod.UID] = s
			if s.Phase == agent.Served {
				served = append(served, s.Pod.UID)
			}
		}
		f.wakeLocked()
		f.mu.Unlock()
		for _, uid := range served {
			f.onServed(uid)
		}
	}
}

func compareUID(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// decodeLines calls take with each JSON line of r until it ends.
func decodeLines[T any](r io.Reader, take func(T)) error {
	for dec := json.NewDecoder(r); ; {
		var v T
		err := dec.Decode(&v)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		take(v)
	}
}
