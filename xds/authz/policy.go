package authz

import "fmt"

// Scope says which workloads a policy applies to by itself.
type Scope uint8

const (
	Global           Scope = iota // Every workload.
	Namespace                     // Every workload of the policy's namespace.
	WorkloadSelector              // Workloads that name the policy's key.
)

// String is the form of config dumps.
func (s Scope) String() string {
	switch s {
	case Global:
		return "Global"
	case Namespace:
		return "Namespace"
	case WorkloadSelector:
		return "WorkloadSelector"
	}
	return fmt.Sprintf("Scope(%d)", uint8(s))
}

// Action says what a match means.
type Action uint8

const (
	Allow Action = iota
	Deny
)

// String is the form of config dumps.
func (a Action) String() string {
	switch a {
	case Allow:
		return "Allow"
	case Deny:
		return "Deny"
	}
	return fmt.Sprintf("Action(%d)", uint8(a))
}

// A Policy is one compiled Authorization.
type Policy struct {
	// Key is the name of the XDS resource, namespace/name.
	Key       string
	Name      string
	Namespace string
	Scope     Scope
	Action    Action
	// DryRun policies are reported in the Verdict and never enforced.
	DryRun bool

	rules []rule
}

// A rule matches when all of its clauses do; without clauses it always does.
type rule []clause

// A clause matches when any of its matches does; without matches it does too.
type clause []match

// Matches tells whether any rule matches. A policy without rules never does.
func (p *Policy) Matches(in *Input) bool {
	for i := range p.rules {
		if p.rules[i].matches(in) {
			return true
		}
	}
	return false
}

func (r rule) matches(in *Input) bool {
	for i := range r {
		if !r[i].matches(in) {
			return false
		}
	}
	return true
}

func (c clause) matches(in *Input) bool {
	for i := range c {
		if c[i].matches(in) {
			return true
		}
	}
	return len(c) == 0
}
