package xds

const (
	// AddressType carries workloads and services (workloadapi.Address).
	AddressType = "type.googleapis.com/istio.workload.Address"
	// AuthorizationType carries L4 policies (securityapi.Authorization).
	AuthorizationType = "type.googleapis.com/istio.security.Authorization"
)

// A Resource is one resource of a response. Body is the encoded message; the
// handler may keep slices of it, nobody writes to it again.
type Resource struct {
	Name    string
	Version string
	Body    []byte
}

// A Rejection names a resource that a handler could not use, and why. The
// reason goes to the server in the NACK, so it must hold no secret.
type Rejection struct {
	Name string
	Err  error
}

// A Handler applies the responses of one type.
type Handler interface {
	// Apply takes all of added in order, then drops removed. A resource that
	// cannot be used is left as it was before and named in the result; the
	// rest must be applied all the same. Apply must not block on the network.
	Apply(added []Resource, removed []string) []Rejection
}

// A Subscription asks for every resource of one type.
type Subscription struct {
	Type    string // Type URL.
	Handler Handler
}
