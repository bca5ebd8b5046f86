package control

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Problem is one thing in a directory that cannot be used, or that is used
// otherwise than its writer may think.
type Problem struct {
	File  string // relative to the directory
	Line  int    // from 1; 0: the file as a whole
	Field string // as in spec.ports[0].port; empty: the object as a whole
	Text  string
	// Warning marks what does not keep the directory from being used.
	Warning bool
}

// String is "file:line: field: text".
func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d", p.Line)
	}
	b.WriteString(": ")
	if p.Warning {
		b.WriteString("warning: ")
	}
	if p.Field != "" {
		b.WriteString(p.Field + ": ")
	}
	b.WriteString(p.Text)
	return b.String()
}

// Report is the outcome of reading a directory once.
type Report struct {
	At       time.Time
	Problems []Problem // by file and line
	Counts   Counts    // of what was read, used or not
	// Used says that what was read is now served. It is so unless a Problem is
	// more than a warning.
	Used bool
}

// Counts are the objects of a directory and what became of them.
type Counts struct {
	Files, Pods, Services, Policies, Ignored int
	Enrolled                                 int // pods that speak HBONE
	Addresses, Authorizations                int // resources served
}

// Err returns the problems that are more than warnings as one error, nil when
// there are none.
func (r Report) Err() error {
	var lines []string
	for _, p := range r.Problems {
		if !p.Warning {
			lines = append(lines, p.String())
		}
	}
	if len(lines) == 0 {
		return nil
	}
	return fmt.Errorf("control: %d problem(s):\n%s", len(lines), strings.Join(lines, "\n"))
}

// Warnings counts the problems that are only warnings.
func (r Report) Warnings() int {
	n := 0
	for _, p := range r.Problems {
		if p.Warning {
			n++
		}
	}
	return n
}

// Summary is the report on one line, without its problems.
func (r Report) Summary() string {
	verdict := "serving"
	if !r.Used {
		verdict = fmt.Sprintf("not used, %d problem(s)", len(r.Problems)-r.Warnings())
	}
	return fmt.Sprintf("%s: %v, %d warning(s)", verdict, r.Counts, r.Warnings())
}

// String is the counts of what was read.
func (c Counts) String() string {
	return fmt.Sprintf("%d files, %d pods (%d enrolled), %d services, %d policies, %d ignored",
		c.Files, c.Pods, c.Enrolled, c.Services, c.Policies, c.Ignored)
}

func sortProblems(ps []Problem) {
	slices.SortStableFunc(ps, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Field, b.Field))
	})
}

// ServiceAddress is where a Service can be reached, for hosts files.
type ServiceAddress struct {
	Namespace, Name string
	Hostname        string       // name.namespace.svc.domain
	Addrs           []netip.Addr // its virtual addresses; for a headless Service its pods'
	Headless        bool
}

// PodPlace is a pod as the directory places it.
type PodPlace struct {
	Namespace, Name, ServiceAccount, Node string
	Addrs                                 []netip.Addr // empty: not served
	Enrolled                              bool         // speaks HBONE
}
